"""One hundred real questions on real weights: the letters and texts of medlora beside those of lm-evaluation-harness.

python -m benchmarks.parity models/smollm2-135m-instruct ../shared/data        a quarter of an hour on one core
python -m benchmarks.parity models/smollm2-135m-instruct ../shared/data --row KorMedMCQA:5     that row again, the others kept

Needs `pip install -e '.[eval-parity]'`. The prompts are those of the harness's task `kormedmcqa`, also for MMLU and MedMCQA,
whose questions have four options. Where the two differ, plain transformers in float64, one question at a time, says who is
right. Writes parity.json and parity.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import LETTERS, ask, load_extraction, read_log_likelihoods, write_tasks
from benchmarks.real_model import read_questions
from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.config.model import BaseModelConfig
from medlora.model.base import load_base
from medlora.model.tokenizer import load_tokenizer
from medlora.prompts import KORMEDMCQA_STOPS, render_mcq
from medlora.records import McqRecord

SHOTS, WRITTEN = 5, 24
"""Solved examples of the few-shot rows; most tokens of a generated answer."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions with the same number of options, and the solved ones to show before them."""

    name: str
    questions: list[McqRecord]
    shots: list[McqRecord]


@dataclass(frozen=True)
class Reading:
    """What one program makes of a question: the letters' log-likelihoods, and the text that it generates."""

    log_likelihoods: tuple[float, ...]
    text: str

    @property
    def letter(self) -> str:
        """The likeliest; of equals the first."""
        return LETTERS[max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)]


def choose_sets(shared: Path, n: int) -> list[QuestionSet]:
    """About `n` questions of three real files, a third of each, in the order of their hashes.

    The solved examples are the five shortest of other questions: five long Korean ones are thousands of tokens.
    """
    korean, medmcqa = read_questions(shared / "kormedmcqa" / "test.jsonl"), read_questions(shared / "medmcqa_dev.json")
    mmlu = read_questions(shared / "mmlu_medical")
    third = n // 3
    korean_shots, shots = (
        sorted(records, key=lambda record: len(render_mcq(record, "kormedmcqa").prompt))[:SHOTS]
        for records in (
            [record for record in read_questions(shared / "kormedmcqa" / "dev.jsonl") if len(record.options) == 5],
            medmcqa[third:],
        )
    )
    return [
        QuestionSet("KorMedMCQA", [each for each in korean if len(each.options) == 5][: n - 2 * third], korean_shots),
        QuestionSet("MMLU medical", mmlu[:third], shots),
        QuestionSet("MedMCQA", medmcqa[:third], shots),
    ]


def ask_medlora(model: Any, tokenizer: Any, records: Sequence[McqRecord], shots: Sequence[McqRecord]) -> list[Reading]:
    """All questions at once, as an evaluation asks them."""
    by_letter, by_text = (
        McqAnswerer(
            model,
            tokenizer,
            AnswerSettings(scoring=scoring, style="kormedmcqa", shots=tuple(shots), max_tokens=WRITTEN),
        ).answer(records)
        for scoring in ("letter", "generate")
    )
    return [Reading(a.log_likelihoods, b.text) for a, b in zip(by_letter, by_text, strict=True)]


def ask_transformers(
    model: Any, tokenizer: Any, records: Sequence[McqRecord], shots: Sequence[McqRecord]
) -> list[Reading]:
    """One question at a time with nothing but transformers: a forward pass for the letters, then `generate`."""
    readings = []
    for record in records:
        prompt = render_mcq(record, "kormedmcqa", shots=shots).prompt
        ids = tokenizer(prompt, return_tensors="pt")
        n = ids["input_ids"].shape[1]
        with torch.no_grad():
            scores = model(**ids).logits[0, -1].log_softmax(-1)
        letters = [tokenizer(f"{prompt} {letter}")["input_ids"][n:] for letter in record.letters]
        if any(len(letter) != 1 for letter in letters):
            raise ValueError("this comparison needs a tokenizer that writes a space and a letter as one token")
        made = model.generate(**ids, max_new_tokens=WRITTEN, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        text = str(tokenizer.decode(made[0, n:], skip_special_tokens=True))
        for word in KORMEDMCQA_STOPS:
            text = text.split(word)[0]
        readings.append(Reading(tuple(scores[letter[0]].item() for letter in letters), text))
    return readings


def ask_harness(model: Any, tokenizer: Any, records: Sequence[McqRecord], shots: Sequence[McqRecord]) -> list[Reading]:
    """The harness's own code on the same model, one question at a time."""
    with tempfile.TemporaryDirectory() as folder:
        test, few_shot = ([_dump(record) for record in each] for each in (records, shots))
        # Without an example of the shown ones the harness cannot load the file of them.
        tasks = write_tasks(Path(folder), test, few_shot or test[:1], WRITTEN, records[0].letters)
        by_letter, by_text = (
            ask(tasks, model, tokenizer, task, len(shots), batch_size=1) for task in ("local_letters", "local_generate")
        )
    return [Reading(tuple(read_log_likelihoods(a)), b["resps"][0][0]) for a, b in zip(by_letter, by_text, strict=True)]


def _dump(record: McqRecord) -> str:
    row = {"question": record.question, **dict(zip(LETTERS, record.options, strict=False))}
    return json.dumps(row | {"answer": LETTERS.index(record.answer) + 1}, ensure_ascii=False)


def load_ours(folder: str) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, as medlora loads them."""
    base = BaseModelConfig(model=folder)
    tokenizer = load_tokenizer(base)
    return load_base(base, tokenizer), tokenizer


def load_plainly(folder: str, dtype: str = "float32") -> tuple[Any, Any]:
    """The same with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def compare(
    name: str, questions: QuestionSet, shots: int, models: tuple[tuple[Any, Any], tuple[Any, Any]]
) -> dict[str, Any]:
    """A row of the table, with every difference in it; `models` are ours, and the one in float64 that decides."""
    ours_model, exact = models
    shown = questions.shots[:shots]
    began = time.process_time()
    ours = ask_medlora(*ours_model, questions.questions, shown)
    middle = time.process_time()
    theirs = ask_harness(*ours_model, questions.questions, shown)
    extract = load_extraction()
    differences = []
    for record, mine, other in zip(questions.questions, ours, theirs, strict=True):
        if (mine.letter, mine.text) != (other.letter, other.text):
            (judge,) = ask_transformers(*exact, [record], shown)
            shown_of = {who: [each.letter, each.text] for who, each in (("medlora", mine), ("lm-eval", other))}
            differences.append({"question": record.id, **shown_of, "float64": [judge.letter, judge.text]})
    pairs = list(zip(ours, theirs, strict=True))
    gaps = [abs(a - b) for x, y in pairs for a, b in zip(x.log_likelihoods, y.log_likelihoods, strict=True)]
    right = [record.answer for record in questions.questions]
    return {
        "set": name,
        "shots": shots,
        "questions": len(pairs),
        "same_letter": sum(x.letter == y.letter for x, y in pairs),
        "same_text": sum(x.text == y.text for x, y in pairs),
        "same_extracted": sum(extract(x.text) == extract(y.text) for x, y in pairs),
        "largest_gap": max(gaps),
        "right": sum(x.letter == answer for (x, _), answer in zip(pairs, right, strict=True)),
        "medlora_cpu_s": round(middle - began, 1),
        "harness_cpu_s": round(time.process_time() - middle, 1),
        "differences": differences,
    }


def describe(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The page: the table, then each difference."""
    lines = [
        "# Parity on real weights",
        "",
        "`python -m benchmarks.parity models/smollm2-135m-instruct ../shared/data`, "
        f"{about['date']}, one thread of {about['machine']}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}.",
        "",
        "| questions | shots | n | same letter | same text | same letter read from it | largest gap of a log-likelihood | "
        "right by letter |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['set']} | {row['shots']} | {row['questions']} | {row['same_letter']} | {row['same_text']} | "
            f"{row['same_extracted']} | {row['largest_gap']:.1e} | {row['right']} |"
        )
    lines += ["", "## Differences", ""]
    found = [(row, each) for row in rows for each in row["differences"]]
    if not found:
        lines.append("None.")
    for row, each in found:
        told = "; ".join(f"{who} `{each[who]}`" for who in ("medlora", "lm-eval", "float64"))
        lines.append(f"- {row['set']} {each['question']}, {row['shots']}-shot: {told}")
    return "\n".join(lines) + "\n"


def _name(row: dict[str, Any]) -> str:
    return f"{row['set']}:{row['shots']}"


def main() -> int:
    """Ask, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of the model")
    parser.add_argument("shared", type=Path, help="the folder of the real questions")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--row", action="append", metavar="SET:SHOTS", help="this row alone; repeatable")
    parser.add_argument("--machine", default="an unnamed machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = (load_ours(arguments.model), load_plainly(arguments.model, "float64"))
    here = Path(__file__).with_suffix("")
    known = (
        {_name(row): row for row in json.loads(here.with_suffix(".json").read_text())["rows"]} if arguments.row else {}
    )
    rows = []
    for shots in (0, SHOTS):
        for questions in choose_sets(arguments.shared, arguments.questions):
            name = f"{questions.name}:{shots}"
            if arguments.row and name not in arguments.row:
                rows += [known[name]] if name in known else []
                continue
            rows.append(compare(questions.name, questions, shots, models))
            print({key: value for key, value in rows[-1].items() if key != "differences"}, flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lm_eval")}
    about = {"date": date.today().isoformat(), "machine": arguments.machine, "versions": versions}
    here.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, ensure_ascii=False, indent=1) + "\n")
    here.with_suffix(".md").write_text(describe(rows, about), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
