"""The data files of a folder, recognised by their columns and names: what each is, what it is for, what cannot be used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medlora.config.sources import SourceConfig
from medlora.data.reading.files import SUFFIXES
from medlora.data.sources import scan
from medlora.errors import InputError

Split = Literal["train", "dev", "test"]

_SPLITS: tuple[tuple[str, Split], ...] = (
    (r"dev|devel|valid|validation|val|검증|개발", "dev"),
    (r"test|tests|heldout|테스트|평가", "test"),
    (r"train|training|학습|훈련", "train"),
)
_SHOTS = r"fewshot|few-shot|few_shot|shots"
_WORDS = r"terms|words|vocab|vocabulary|extra_tokens|용어|어휘"
_PAIR = re.compile(r"^(?P<stem>.*[._-])?(?P<language>en|eng|english|ko|kor|korean)$", re.IGNORECASE)
_ENGLISH = ("en", "eng", "english")
_MOST_FILES = 2_000


@dataclass(frozen=True)
class DataFile:
    """A source that was recognised: its kind, the split that its name says, and what its scan counted."""

    source: str
    kind: str
    split: Split
    records: int
    names_split: bool = True
    """Whether its name says the split; else it is taken to train on."""
    has_rationale: bool = False


@dataclass
class Folder:
    """What a folder of data holds."""

    files: list[DataFile] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """Files with a word a line, for `base.extra_tokens`."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Files that cannot be used, with the reason."""

    def select(self, kind: str, split: Split) -> list[DataFile]:
        """The files of that kind and split."""
        return [file for file in self.files if (file.kind, file.split) == (kind, split)]


def recognise(folder: Path) -> Folder:
    """Look at every file below a folder; raises InputError where there is no such folder, or none of its files can be used."""
    if not folder.is_dir():
        raise InputError(f"--data {folder}: there is no such folder")
    found = Folder()
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(folder))]
    if len(paths) > _MOST_FILES:
        raise InputError(
            f"--data {folder}: has {len(paths):,} files, at most {_MOST_FILES:,} are looked at; name a folder in it"
        )
    pairs = dict(_find_pairs(paths))
    for path in paths:
        if path in pairs.values():
            continue
        name = "/".join(path.relative_to(folder).with_suffix("").parts)
        if path in pairs:
            _add(found, f"{path}|{pairs[path]}", name, "auto")
        elif not any(path.name.removesuffix(".gz").removesuffix(".zst").endswith(ending) for ending in SUFFIXES):
            found.left_out[str(path)] = f"{path.suffix or 'a file without ending'} is no format of data that is known"
        elif path.suffix == ".txt" and _says(path.stem, _WORDS):
            found.words.append(str(path))
        elif _says(name, _SHOTS):
            found.left_out[str(path)] = "holds few-shot examples by its name; name it in evaluation.few_shot"
        else:
            _add(found, str(path), name, "text" if path.suffix == ".txt" else "auto")
    if not found.files:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in list(found.left_out.items())[:10])
        raise InputError(f"--data {folder}: holds no data that can be used{reasons}")
    return found


def _add(found: Folder, source: str, name: str, kind: Literal["auto", "text"]) -> None:
    """Scan a source and add it to what can be used or to what is left out."""
    try:
        scanned = scan(SourceConfig(source=source, kind=kind))
        scanned.check(0.0)
    except InputError as error:
        reason = str(error).partition("\n")[0].removeprefix(source).lstrip(": ").partition("; known: ")[0].rstrip(":")
        found.left_out[source] = f"{reason} (`medlora inspect` shows its rows)"
        return
    split = find_split(name)
    file = DataFile(source, scanned.kind, split or "train", scanned.records, split is not None, bool(scanned.rationale))
    found.files.append(file)


def find_split(name: str) -> Split | None:
    """The split that a file's name says, the last part of its path first; None where it says none."""
    for part in reversed(name.split("/")):
        for words, split in _SPLITS:
            if _says(part, words):
                return split
    return None


def _says(name: str, words: str) -> bool:
    return bool(re.search(rf"(?:^|[^a-z])(?:{words})(?:[^a-z]|$)", name, flags=re.IGNORECASE))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _find_pairs(paths: list[Path]) -> Iterator[tuple[Path, Path]]:
    """Text files that differ in their language alone: English, then Korean (`corpus.en` and `corpus.ko`, also with .txt)."""
    by_stem: dict[tuple[Path, str, str], dict[bool, Path]] = {}
    for path in paths:
        stem = path.stem if path.suffix == ".txt" else path.name
        if found := _PAIR.match(stem):
            is_english = found["language"].lower() in _ENGLISH
            key = (path.parent, found["stem"] or "", path.suffix if path.suffix == ".txt" else "")
            by_stem.setdefault(key, {})[is_english] = path
    for sides in by_stem.values():
        if len(sides) == 2:
            yield sides[True], sides[False]
