"""The documents hold: every line of docs/coming-from-scripts.md works, every link and file named in a document exists.

The lines that load a model (ids `torch-...`) run on a curriculum that `configs/medgemma-4b.yaml` describes, trained here for
two steps a phase on a tiny random multimodal Gemma 3 and on data files and adapter folders as the replaced scripts had them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from medlora.cli import train
from medlora.config.loading.files import load, read_yaml
from medlora.records import McqRecord, TextRecord, TranslationRecord
from medlora.runs.files import write_json, write_yaml
from medlora.runs.folders import open_run
from tests.support import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "README.ko.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "medlora").rglob("README.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
CONFIGS = [ROOT / "configs" / f"{name}.yaml" for name in ("quickstart", "medgemma-4b", "medgemma-27b")]

# ---- the table ------------------------------------------------------------------------------------------------------

PROMISED = [
    "TrainingLogger",
    "clear_gpu_memory",
    "check_gpu_status",
    "BASE_DIR",
    "get_model_output_dir",
    "find_lora_path",
    "get_raw_lora_model_path",
    "get_previous_phase_lora",
    "get_lora_chain",
    "LossLoggingCallback",
    "MCQValidationCallback",
    "get_terminators",
    "MCQEvaluator",
    "evaluate",
    "quick_evaluate",
    "evaluate_mcq_batch",
    "extract_answer_letter",
    "load_for_train_00",
    "load_for_train_01",
    "load_for_train_02",
    "validate_mcq_output",
    "validate_mcq_fields",
    "validate_translation_output",
    "MCQ_TRAIN_TEMPLATE",
    "MCQ_VALIDATE_TEMPLATE",
    "MODEL_CONFIGS",
    "MAX_LENGTHS",
    "TRAINING_DEFAULTS",
    "TRAIN_02_CONFIGS",
    "MEMORY_CONFIGS",
    "train_00_plain_text",
    "train_01_mixed",
    "train_02_kor_med_test",
    "--model",
    "--device",
    "--epochs",
    "--max-samples",
    "12",
    "GB",
    "24",
    "GB",
    "48",
    "GB",
    "80",
    "GB",
    "text",
    "english",
    "korean",
    "question",
    "answer",
]


@dataclass(frozen=True)
class Line:
    """A row of the document: what they had, the one line of ours, and the code that opens its section."""

    section: str
    theirs: str
    ours: str
    setup: str

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "_", self.theirs).strip("_")[:40]

    @property
    def kind(self) -> str:
        if self.ours.startswith("--set "):
            return "set"
        return "command" if self.ours.startswith("python jobs/") else "python"

    @property
    def needs_torch(self) -> bool:
        packages = "model|answering|training|tokens|kernels"
        return bool(re.search(rf"import torch|medlora\.({packages})\b|open_run", self.setup))


def read_lines(text: str) -> Iterator[Line]:
    """Every row of every table; raises AssertionError for one that has not exactly one code span in its second cell."""
    section = setup = ""
    code = None
    for row in text.splitlines():
        if row.startswith("```"):
            setup, code = (setup + "\n".join(code), None) if code is not None else (setup, [])
        elif code is not None:
            code.append(row)
        elif row.startswith("## "):
            section, setup = row.removeprefix("## "), ""
        elif row.startswith("|") and not re.match(r"\|(-+\||.*\| ours \|)", row):
            cells = [cell.strip() for cell in row.strip().strip("|").split(" | ")]
            assert re.fullmatch(r"`[^`]+`", cells[1]), f"no single line of ours in: {row}"
            yield Line(section, cells[0], cells[1].strip("`"), setup)


LINES = list(read_lines((ROOT / "docs" / "coming-from-scripts.md").read_text(encoding="utf-8")))


def having(*kinds: str, torch: bool | None = None) -> Any:
    chosen = [line for line in LINES if line.kind in kinds and torch in (None, line.needs_torch)]
    ids = [f"{'torch-' if torch else ''}{line.section}-{line.name}" for line in chosen]
    return pytest.mark.parametrize("line", chosen, ids=ids)


def test_every_name_of_the_scripts_stands_in_the_table() -> None:
    words = set(re.findall(r"[\w-]+", " ".join(line.theirs for line in LINES)))
    assert [name for name in PROMISED if name not in words] == []


def test_a_row_without_a_line_is_seen() -> None:
    with pytest.raises(AssertionError, match="no single line of ours"):
        list(read_lines("## x\n| theirs | ours | what to know |\n|---|---|---|\n| `name` | see below | |"))


# ---- lines for a shell ----------------------------------------------------------------------------------------------


def parse_command(arguments: list[str]) -> Any:
    """As `jobs/curriculum.py` parses them, which is a door to `medlora train`."""
    return train.parse(arguments)


def values_at(config: Any, key: str) -> list[Any]:
    """What a loaded config, as plain values, has at a dotted key: one value, or that of each phase for phase_defaults."""
    first, _, rest = key.partition(".")
    if first == "phase_defaults":
        return [value for phase in config["phases"] for value in values_at(phase, rest)]
    if isinstance(config, list):
        found = next((item for item in config if item.get("name") == first), None)
        found = config[int(first)] if found is None else found
    else:
        found = config[first]
    return values_at(found, rest) if rest else [found]


@having("set")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_setting_is_accepted_and_arrives(line: Line, config: Path) -> None:
    overrides = parse_command(shlex.split(line.ours)).overrides
    assert overrides
    loaded = load(config, overrides).model_dump(mode="json")
    for key, _, value in (override.partition("=") for override in overrides):
        assert read_yaml(value) in values_at(loaded, key), key


@pytest.mark.parametrize(
    "config", [path for path in CONFIGS if path.stem.startswith("medgemma")], ids=lambda path: path.stem
)
def test_memory_settings_keep_the_global_batch(config: Path) -> None:
    lines = [line for line in LINES if re.match(r"\d+ GB", line.theirs)]
    for line in lines:
        phases = load(config, parse_command(shlex.split(line.ours)).overrides).phases
        assert {phase.count_batch(1) for phase in phases} == {32}, line.theirs
        assert (
            "not measured"
            in (ROOT / "docs" / "coming-from-scripts.md")
            .read_text(encoding="utf-8")
            .split(line.ours)[1]
            .splitlines()[0]
        )
    assert len(lines) == 7


@having("command")
def test_a_command_names_a_config_that_loads(line: Line) -> None:
    command = shlex.split(line.ours)
    assert command[:2] == ["python", "jobs/curriculum.py"]
    arguments = parse_command(command[2:])
    model = re.search(r"--model (\S+)", line.theirs)
    (config,) = arguments.config
    assert load(ROOT / config, arguments.overrides).name == (model[1].strip("`") if model else "medgemma-4b")


# ---- lines of Python ------------------------------------------------------------------------------------------------


def _is_adapter(folder: Any) -> bool:
    return (Path(folder) / "adapter_config.json").is_file() and (Path(folder) / "adapter_model.safetensors").is_file()


def _trainable(model: Any) -> set[str]:
    return {name.split(".adapter-")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def _active(model: Any) -> list[str]:
    return [name.removeprefix("adapter-") for name in model.active_adapters]


def _answers_all(answers: Any, n: int) -> bool:
    return len(answers) == n and all(a.choice in "ABCDE" and abs(sum(a.probabilities) - 1) < 1e-4 for a in answers)


def _resolved(*parts: str) -> Path:
    return Path.cwd().joinpath("runs", "medgemma-4b", *parts)


# fmt: off
# What the value of a line must be, by section and the first word of theirs.
EXPECTED: dict[tuple[str, str], Callable[[Any], bool]] = {
    ("Data files", "text"): lambda v: len(v) == 12 and all(isinstance(r, TextRecord) for r in v),
    ("Data files", "english_korean"): lambda v: len(v) == 8 and all(isinstance(r, TranslationRecord) for r in v),
    ("Data files", "question_A_E_answer"): lambda v: ([r.answer for r in v[:3]] == ["A", "B", "C"] and v[0].letters == "ABCDE"),
    ("Data files", "load_mcq_test_data"): lambda v: len(v) == 2 and all(isinstance(r, McqRecord) for r in v),
    ("Data files", "get_data_path"): lambda v: len(v) == 10 and all(isinstance(r, McqRecord) for r in v),
    ("Data files", "validate_plain_text_sample"): lambda v: len(v) == 8,
    ("_paths", "BASE_DIR"): lambda v: v == _resolved(),
    ("_paths", "get_model_output_dir"): lambda v: (v in (_resolved("phases", "00"), _resolved("phases", "00", "adapter")) and v.is_dir()),
    ("_paths", "get_checkpoint_dir"): lambda v: v == _resolved("phases", "00", "checkpoints"),
    ("_paths", "get_log_dir"): lambda v: v.is_file(),
    ("_paths", "find_lora_path"): lambda v: v == Path("model/01_mixed/medgemma-4b/final") and _is_adapter(v),
    ("_paths", "get_previous_phase_lora"): lambda v: _is_adapter(v) and v == _resolved("phases", "01", "adapter"),
    ("_paths", "get_lora_chain"): lambda v: (v == [str(_resolved("phases", n, "adapter")) for n in ("01", "02")] and all(map(_is_adapter, v))),
    ("_paths", "get_raw_lora_model_path"): _is_adapter,
    ("_logging", "TrainingLogger"): lambda v: "begins" in Path("train_00.log").read_text(encoding="utf-8"),
    ("_logging", "TrainingLogger_log"): lambda v: "phase 00 (new) on" in v and "GiB free" in v,
    ("_logging", "TrainingLogger_log_val"): lambda v: "accuracy" in v and "loss" not in v,
    ("_logging", "clear_gpu_memory"): lambda v: v is None,
    ("_logging", "check_gpu_status"): lambda v: v.name != "" and v.total_bytes >= v.free_bytes > 0,
    ("_logging", "report_memory_usage"): lambda v: v > 0,
    ("_callbacks", "LossLoggingCallback"): lambda v: ([step for step, _ in v] == [1, 2] and all(loss > 0 for _, loss in v)),
    ("_callbacks", "MCQValidationCallback_get_history"): lambda v: (len(v) > 0 and all(0 <= accuracy <= 1 for _, accuracy in v)),
    ("_callbacks", "get_terminators"): lambda v: v == [1, 5],  # <eos> and <end_of_turn> of the tiny tokenizer
    ("_callbacks", "generate_response"): lambda v: isinstance(v, str),
    ("_callbacks", "truncate_at_end_of_turn"): lambda v: v.strip() == "B",
    ("_mcq_evaluation", "MCQEvaluator"): lambda v: v.accuracy.total == len(v.predictions) == 5 and "of     5" in str(v),
    ("_mcq_evaluation", "MCQEvaluator_quick_evaluate"): lambda v: _answers_all(v.predictions, 3),
    ("_mcq_evaluation", "evaluate_mcq_batch"): lambda v: _answers_all(v, 5) and any(a.text for a in v),
    ("_mcq_evaluation", "evaluate_with_format_scoring"): lambda v: v == [1.0] * 5,
    ("_mcq_evaluation", "extract_answer_letter"): lambda v: v == "B",
    ("_add_lora", "load_for_train_00"): lambda v: _active(v) == ["00"] and _trainable(v) == {"00"},
    ("_add_lora", "load_for_train_01"): lambda v: _active(v) == ["01"] and _trainable(v) == {"01"},
    ("_add_lora", "load_for_train_02"): lambda v: _active(v) == ["01", "02"] and _trainable(v) == {"02"},
    ("_add_lora", "an"): lambda v: _active(v) == ["theirs"] and _trainable(v) == set(),
    ("_add_lora", "an_untrained"): lambda v: _is_adapter("model/raw_lora_added/mine"),
    ("_validation", "validate_mcq_output"): lambda v: v == pytest.approx(1.0),
    ("_validation", "validate_mcq_fields"): lambda v: v == (),
    ("_validation", "extract_answer_from_output"): lambda v: v == "B",
    ("_validation", "validate_translation_output"): lambda v: v == pytest.approx(0.75),
    ("_train_text_format", "MCQ_TRAIN_TEMPLATE"): lambda v: (v.prompt.count("열이 나는") == 2 and v.completion.endswith("answer:\nA")),
    ("_train_text_format", "SIMPLE_PROMPT_TEMPLATE"): lambda v: (v.prompt.count("열이 나는") == 1 and v.completion.endswith("answer:\nA")),
    ("_train_text_format", "MCQ_VALIDATE_TEMPLATE"): lambda v: "A. 해열제" in v,
    ("_train_text_format", "TRANSLATION_EN_TO_KO_SIMPLE"): lambda v: "fever" in v.prompt and v.completion == "발열",
    ("_train_text_format", "TRANSLATION_KO_TO_EN_SIMPLE"): lambda v: "발열" in v.prompt and v.completion == "fever",
    ("_train_text_format", "text"): lambda v: v.prompt == "" and v.completion == "발열은 증상이다.",
    ("_train_text_format", "get_template_hash"): lambda v: re.fullmatch("[0-9a-f]{12}", v) is not None,
}
# fmt: on


def expected_of(line: Line) -> Callable[[Any], bool]:
    """The longest key that the row's name begins with; a row without one has to be given one here."""
    found = [key for key in EXPECTED if key[0] == line.section and line.name.startswith(key[1])]
    assert found, f"no expectation for {line.section}: {line.theirs}"
    return EXPECTED[max(found, key=lambda key: len(key[1]))]


def run_line(line: Line, names: dict[str, Any]) -> Any:
    """The value of a line; None for a statement."""
    *before, last = ast.parse(line.ours).body
    exec(compile(ast.Module(body=before, type_ignores=[]), line.theirs, "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), line.theirs, "eval"), names)
    return exec(compile(ast.Module(body=[last], type_ignores=[]), line.theirs, "exec"), names)


def test_every_expectation_belongs_to_a_line() -> None:
    used = {id(expected_of(line)) for line in LINES if line.kind == "python"}
    assert [key for key, expectation in EXPECTED.items() if id(expectation) not in used] == []


# ---- a place to run them: the scripts' files, and a run -------------------------------------------------------------

TERMS = ["아스피린", "인슐린", "aspirin", "insulin", "해열", "췌장"]


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_their_data() -> None:
    """Data files as the scripts had them, below the working directory."""
    data = "data/02_refined"
    texts = [{"text": f"{TERMS[i % 6]} 은 {TERMS[(i + 1) % 6]} 이다"} for i in range(12)]
    pairs = [{"english": f"text about {TERMS[i % 6]}", "korean": f"{TERMS[i % 6]} 이다"} for i in range(8)]
    questions = [
        {
            "question": f"{TERMS[i % 6]} 은 {i}?",
            **{letter: TERMS[(i + j) % 6] for j, letter in enumerate("ABCDE")},
            "answer": "ABCDE"[i % 5],
        }
        for i in range(20)
    ]
    write_rows(f"{data}/00_plain_text/train.jsonl", texts)
    write_rows(f"{data}/01_english_korean/train.jsonl", pairs)
    write_rows(f"{data}/02_kor_med_test/train.jsonl", questions[:10])
    write_rows(f"{data}/02_kor_med_test/dev.jsonl", questions[10:15])
    write_rows(f"{data}/02_kor_med_test/test.jsonl", questions[15:])


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The scripts' data files, and nothing that needs torch; the working directory while the module runs."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("workplace"))
    write_their_data()
    yield Path.cwd()
    os.chdir(before)


@pytest.fixture(scope="module")
def workplace(empty: Path) -> Path:
    """Also a tiny base under the name of the real one, adapters of the scripts, and a finished run."""
    torch = pytest.importorskip("torch")
    from tests.support.tiny import EXTRA, build_bases

    torch.set_num_threads(1)
    Path("google").mkdir()
    Path(build_bases(empty / "bases")["medgemma"]).rename("google/medgemma-4b-it")
    save_as_the_scripts_did("model/01_mixed/medgemma-4b/final", EXTRA)
    save_as_the_scripts_did("model/raw_lora_added/medgemma-4b", EXTRA)
    train_curriculum(EXTRA)
    return empty


def save_as_the_scripts_did(folder: str, words: tuple[str, ...]) -> None:
    """What `trainer.save_model` of theirs left: bare target names, whole embeddings beside the LoRA matrices.

    That such a folder gives the same logits here as under plain PEFT is held by tests/test_chains.py.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("google/medgemma-4b-it")
    tokenizer.add_tokens(list(words))
    model = AutoModelForCausalLM.from_pretrained("google/medgemma-4b-it")
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    get_peft_model(model, lora).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_curriculum(words: tuple[str, ...]) -> None:
    """The three phases of configs/medgemma-4b.yaml, two steps each, into runs/medgemma-4b."""
    from medlora.curriculum.chains import extend_chain
    from medlora.curriculum.jobs import make_job
    from medlora.training.phase import run_phase

    data = "data/02_refined"
    small = ["max_steps=2", "batch_size=2", "accumulation=1", "log_every_steps=1"]
    dev = f"[{{source: {data}/02_kor_med_test/dev.jsonl}}]"
    config = load(
        ROOT / "configs" / "medgemma-4b.yaml",
        [
            f"base.extra_tokens=[{', '.join(words)}]",
            "evaluation=null",
            *(f"phase_defaults.{setting}" for setting in small),
            f"phases.00.sources.0.source={data}/00_plain_text/train.jsonl",
            f"phases.00.validation.sources.0.source={data}/00_plain_text/train.jsonl",
            f"phases.01.sources.0.source={data}/01_english_korean/train.jsonl",
            f"phases.01.sources.1.source={data}/02_kor_med_test/train.jsonl",
            f"phases.01.validation.sources={dev}",
            f"phases.02.sources=[{{source: {data}/02_kor_med_test/train.jsonl}}]",
            f"phases.02.validation={{sources: {dev}, scoring: reason, max_tokens: 8, sample: 2}}",
            "phases.02.full_prompt={records: 4, max_steps: 1}",
        ],
    )
    run = open_run(Path("runs/medgemma-4b"))
    chain: tuple[Any, ...] = ()
    for phase in config.phases:
        run_phase(make_job(config, phase, chain), run.phase(phase.name), lambda event: None)
        chain = extend_chain(chain, phase, run.phase(phase.name).adapter)
    write_json(run.about, {"name": config.name})
    write_yaml(run.config, config.model_dump(mode="json"))


@having("python", torch=False)
def test_a_line_of_python_works(line: Line, empty: Path) -> None:
    names: dict[str, Any] = {}
    exec(line.setup, names)
    value = run_line(line, names)
    assert expected_of(line)(value), value


@having("python", torch=True)
def test_a_line_of_python_works_on_a_model(line: Line, workplace: Path) -> None:
    names: dict[str, Any] = {}
    exec(line.setup, names)
    value = run_line(line, names)
    assert expected_of(line)(value), value


# ---- links and paths ------------------------------------------------------------------------------------------------

_FOLDERS = "medlora|jobs|configs|docs|tests|benchmarks"
_FILES = r"Makefile|LICENSE|README\.md|pyproject\.toml|constraints\.txt|cluster\.yaml"


def find_missing(text: str, folder: Path) -> list[str]:
    """Relative link targets of a document in `folder`, and paths of this repository that it names, that do not exist."""
    links = re.findall(r"\]\(<?([^)\s>#]+)[^)]*\)", text)
    missing = [link for link in links if not re.match(r"[a-z]+:", link) and not (folder / link).exists()]
    named = re.findall(rf"(?<![\w./~-])(?:\./)?((?:{_FOLDERS})/[\w./-]*[\w/])", text)
    named += re.findall(rf"`({_FILES})`", text)
    return missing + [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_links_to_or_names_exists(document: Path) -> None:
    assert find_missing(document.read_text(encoding="utf-8"), document.parent) == []


def test_a_dead_link_and_a_wrong_path_are_found() -> None:
    text = "[a](gone.md#x) [b](https://x.org/docs/y.md) [c](../README.md) run `python jobs/none.py`, see configs/quickstart.yaml."
    assert find_missing(text, ROOT / "docs") == ["gone.md", "jobs/none.py"]


def list_parts(text: str) -> dict[str, list[str]]:
    """What a document and its translation share: links, commands, blocks as they are, and the shape of headings and tables."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    commands = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return {
        "links": sorted(set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.ko.md"}),
        "commands": commands,
        "blocks": re.findall(r"```text\n.*?```", text, flags=re.S),
        "headings": re.findall(r"^#+ ", text, flags=re.M),
        "rows": [str(line.count("|")) for line in text.splitlines() if line.startswith("|")],
        "code": sorted(re.findall(r"`[^`\n]+`", re.sub(r"```.*?```", "", text, flags=re.S))),
    }


def test_the_korean_readme_is_the_english_one_in_korean() -> None:
    english, korean = (list_parts((ROOT / name).read_text(encoding="utf-8")) for name in ("README.md", "README.ko.md"))
    for part, found in english.items():
        assert korean[part] == found, part
