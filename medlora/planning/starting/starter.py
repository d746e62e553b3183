"""A starting config: a shipped one as it is, or the template of a family, with the data of a folder filled in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora.config.loading.edits import ConfigText
from medlora.config.loading.files import read_yaml
from medlora.errors import InputError
from medlora.planning.starting.recognise import DataFile, Folder


@dataclass(frozen=True)
class Family:
    """A base that the template is written for, and what to know about it."""

    model: str
    about: str


FAMILIES = {
    "gemma": Family(
        "google/gemma-3-4b-it",
        "Gemma 3 4B (multimodal; text only here). Gated: accept its terms on the hub, or name a downloaded folder.",
    ),
    "qwen": Family(
        "Qwen/Qwen3-8B",
        "Qwen3 8B (Apache 2.0). Its own thinking is switched off: answers are trained outside of its think block.",
    ),
    "llama": Family(
        "meta-llama/Llama-3.1-8B-Instruct",
        "Llama 3.1 8B. Gated: accept its licence on the hub, or name a downloaded folder.",
    ),
    "exaone": Family(
        "LGAI-EXAONE/EXAONE-4.0-1.2B",
        "EXAONE 4.0 1.2B (Korean and English). Its licence restricts commercial use: read it before you train.",
    ),
}
SHIPPED = ("quickstart", "medgemma-4b", "medgemma-27b", "evaluate", "sweep")
"""Configs that are written as they are."""


def fill_family(template: str, name: str) -> str:
    """The template with the base of a family."""
    family = FAMILIES[name]
    text = ConfigText(template)
    text.put(("name",), name)
    text.put(("base", "model"), family.model)
    at = next(i for i, line in enumerate(text.lines) if line.startswith("# A general base"))
    text.lines[at] = f"# {family.about}"
    return str(text)


def fill_data(config: str, data: Folder) -> tuple[str, list[str]]:
    """A run's config with the data of a folder in its three phases and its evaluation, and notes on what was changed.

    Text goes to phase 00, translations to 01, questions to 01 and 02; dev questions validate, test questions are the
    evaluation. A phase without data is removed. Raises InputError where no phase would be left.
    """
    text, notes = ConfigText(config), list[str]()
    train = data.select("mcq", "train")
    filled = {
        "00": [_name_source(file) for file in data.select("text", "train")],
        "01": _mix(data.select("translation", "train"), train),
        "02": [_name_source(file, **({} if file.has_rationale else {"style": "answer"})) for file in train],
    }
    if not any(filled.values()):
        raise InputError("--data: holds nothing to train on: no text, no translations, no questions of a train split")
    kept = [phase for phase in filled if filled[phase]]
    for phase, sources in filled.items():
        if sources:
            text.put(("phases", phase, "sources"), sources)
        else:
            text.drop(("phases", phase))
            notes.append(f"phase {phase} is left out: the folder has no data for it")
    _mend_chain(text, kept)
    _fill_validation(text, kept, data, notes)  # first: it replaces every alias, so that the text is whole YAML again
    _fill_words(text, kept, data, notes)
    _fill_tests(text, data, notes)
    reasons = any(file.has_rationale for file in train)
    if train and not reasons:
        _ask_for_letters(text, kept, notes)
    return str(text), notes


def fill_tests(config: str, data: Folder) -> tuple[str, list[str]]:
    """An evaluation's config with the test questions of a folder; raises InputError where it has none."""
    if not data.select("mcq", "test"):
        raise InputError("--data: holds no questions with `test` in their name; an evaluation needs some")
    text, notes = ConfigText(config), list[str]()
    _fill_tests(text, data, notes)
    return str(text), notes


def _mix(pairs: Sequence[DataFile], questions: Sequence[DataFile]) -> list[dict[str, Any]]:
    """The sources of phase 01: translations, and questions at 30 % where there are both."""
    if not pairs:
        return []
    share = {"weight": round(0.7 / len(pairs), 4)} if questions else {}
    mixed = [_name_source(file, **share) for file in pairs]
    return mixed + [_name_source(file, weight=round(0.3 / len(questions), 4), style="answer") for file in questions]


def _name_source(file: DataFile, **more: Any) -> dict[str, Any]:
    kind = {} if "|" in file.source else {"kind": file.kind}
    return {"source": file.source, **kind, **more}


def _mend_chain(text: ConfigText, kept: Sequence[str]) -> None:
    """Let the first phase begin an adapter, and replay only phases that are there."""
    text.put(("phases", kept[0], "chain"), "new")
    if "00" not in kept:
        for phase in kept:
            text.drop(("phases", phase, "replay"))


def _fill_words(text: ConfigText, kept: Sequence[str], data: Folder, notes: list[str]) -> None:
    """Added words: those of the folder, else the config's own unless they are in a file that is not here."""
    words = read_yaml(str(text))["base"].get("extra_tokens") or []
    if data.words and "00" in kept:
        text.put(("base", "extra_tokens"), [f"file:{path}" for path in data.words])
        text.put(("phases", "00", "train_extra_tokens"), True)
        notes.append(f"words to add: {', '.join(data.words)}; phase 00 trains their rows")
        return
    lacking = [word for word in words if word.startswith("file:") and not Path(word.removeprefix("file:")).is_file()]
    if words and (lacking or "00" not in kept):
        text.put(("base", "extra_tokens"), [])
        notes.append("base.extra_tokens is empty: the folder has no list of words, or no plain text to learn them from")
    if not words or lacking:
        text.drop(("phases", "00", "train_extra_tokens"))
    for path in data.words:
        data.left_out[path] = "is a list of words by its name, which only phase 00 with plain text can learn"


def _fill_validation(text: ConfigText, kept: Sequence[str], data: Folder, notes: list[str]) -> None:
    """Dev sources of each phase; a phase without any loses its validation and what depends on it."""
    for phase in kept:
        kind = "text" if phase == "00" else "mcq"
        dev = [_name_source(file) for file in data.select(kind, "dev")]
        if dev and text.has(("phases", phase, "validation")):
            text.put(("phases", phase, "validation", "sources"), dev)
        elif dev:
            text.put(("phases", phase, "validation"), {"sources": dev})
        else:
            text.drop(("phases", phase, "validation"))
            text.drop(("phases", phase, "full_prompt"))
            notes.append(f"phase {phase} has no validation: the folder has no {kind} with dev or valid in its name")
    for file in data.select("translation", "dev"):
        data.left_out[file.source] = "is a dev split of translations; name it in a phase's validation to score them"


def _fill_tests(text: ConfigText, data: Folder, notes: list[str]) -> None:
    tests = data.select("mcq", "test")
    if not tests:
        text.drop(("evaluation",))
        notes.append("there is no evaluation: the folder has no questions with test in their name")
    else:
        named = [{"name": name, **_name_source(file)} for name, file in zip(_name_tests(tests), tests, strict=True)]
        text.put(("evaluation", "tests"), named)
    for kind in ("text", "translation"):
        for file in data.select(kind, "test"):
            data.left_out[file.source] = f"is a test split of {kind}; a test here is multiple choice"


def _ask_for_letters(text: ConfigText, kept: Sequence[str], notes: list[str]) -> None:
    """Without rationales nothing can be learnt of reasoning: letters are asked for at once."""
    for phase in kept:
        text.drop(("phases", phase, "full_prompt"))
        if phase != "00" and text.has(("phases", phase, "validation")):
            text.put(("phases", phase, "validation", "scoring"), "letter")
            text.put(("phases", phase, "validation", "style"), "answer")
    if text.has(("evaluation",)):
        text.put(("evaluation", "scoring"), "letter")
        text.put(("evaluation", "style"), "answer")
    notes.append(
        "no question has a rationale: the letter alone is trained and asked for (style: answer, scoring: letter)"
    )


def _name_tests(tests: Sequence[DataFile]) -> list[str]:
    """A name for each test, from its path; names differ."""
    names = list[str]()
    for file in tests:
        parts = [re.sub(r"[^A-Za-z0-9_-]+", "-", part).strip("-_") for part in Path(file.source).with_suffix("").parts]
        parts = [part for part in parts if part]
        stem = parts[-1] if parts else "test"
        if stem.lower() in ("test", "tests") and len(parts) > 1:
            stem = parts[-2]
        stem, n = (stem if stem[:1].isalnum() else f"test-{stem}")[:56].rstrip("-"), 1
        while (name := stem if n == 1 else f"{stem}-{n}") in names:
            n += 1
        names.append(name)
    return names
