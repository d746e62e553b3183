"""Records -> tokens on disk: a source is tokenised once for a tokenizer and a prompt style, and read memory-mapped.

    <cache>/tokens/<fingerprint>/  part-00000.arrow ... manifest.json

Sequence length, packing and order are no part of the fingerprint. Rows are planned from the lengths alone (see
`rows.Rows`), so that another length, packing or seed reads the same tokens.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pyarrow

from medlora import prompts
from medlora.config.sources import SourceConfig
from medlora.data.sources import scan, stream
from medlora.errors import InputError
from medlora.records import McqRecord, Record
from medlora.runs.files import remove
from medlora.runs.manifests import MANIFEST, check_files, commit, find_differences, hash_json, read_manifest
from medlora.tokens.encode import Tokens, tokenise
from medlora.tokens.tokenizer import Tokenizer

log = logging.getLogger("medlora.phase")


_CHUNK = 256
"""Records that are tokenised together and make a record batch."""


_SCHEMA = pyarrow.schema(
    {
        "ids": pyarrow.list_(pyarrow.int32()),
        "prompt": pyarrow.int32(),
        "is_text": pyarrow.bool_(),
        "first": pyarrow.bool_(),
        "record": pyarrow.string(),
    }
)
"""`first`: whether the example is the first of its record; a translation pair makes two."""


FIRST = "for the first time"


Progress = Callable[[int, int], None]
"""Called with how many records are done, and how many there are."""


class TokenStore(Sequence[Tokens]):
    """The examples of a source in its Arrow files; ids stay on disk until they are read."""

    def __init__(self, folder: Path) -> None:
        self.ids: list[pyarrow.ListArray] = []
        columns: dict[str, list[numpy.ndarray]] = {name: [] for name in ("length", "prompt", "is_text", "first")}
        self._names: list[pyarrow.Array] = []
        ends = [0]
        for part in sorted(folder.glob("part-*.arrow")):
            with pyarrow.memory_map(str(part)) as source:
                reader = pyarrow.ipc.open_file(source)
                for i in range(reader.num_record_batches):
                    batch = reader.get_batch(i)
                    self.ids.append(batch.column("ids"))
                    self._names.append(batch.column("record"))
                    ends.append(ends[-1] + len(batch))
                    columns["length"].append(batch.column("ids").value_lengths().to_numpy())
                    for name in ("prompt", "is_text", "first"):
                        columns[name].append(batch.column(name).to_numpy(zero_copy_only=False))
        self.ends = ends[1:]
        joined = {name: numpy.concatenate(parts) if parts else numpy.zeros(0) for name, parts in columns.items()}
        self.lengths, self.prompts = joined["length"].astype(numpy.int64), joined["prompt"].astype(numpy.int64)
        self.texts = joined["is_text"].astype(bool)
        self.starts = numpy.flatnonzero(joined["first"])
        """The first example of each record."""

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        part = bisect_right(self.ends, index)
        row = index - (self.ends[part - 1] if part else 0)
        return Tokens(self.ids[part][row].values.to_pylist(), int(self.prompts[index]), bool(self.texts[index]))

    def name_record(self, index: int) -> str:
        """The id of the record that the example at this place comes from."""
        part = bisect_right(self.ends, index)
        return str(self._names[part][index - (self.ends[part - 1] if part else 0)].as_py())

    def order_examples(self, records: Iterable[int]) -> list[int]:
        """The examples of the records at these places, record by record."""
        ends = numpy.append(self.starts[1:], len(self))
        return [i for record in records for i in range(self.starts[record], ends[record])]

    def find_included(self, dropped: Iterable[str]) -> list[int]:
        """The places of the records whose id was not dropped."""
        out = set(dropped)
        if not out:
            return list(range(len(self.starts)))
        names = pyarrow.chunked_array(self._names, pyarrow.string()).take(pyarrow.array(self.starts)).to_pylist()
        return [place for place, name in enumerate(names) if name not in out]


@dataclass(frozen=True)
class Preparation:
    """What the tokens of a source are made from, and the folder that holds them or is going to."""

    source: SourceConfig
    style: str
    fingerprint: dict[str, Any]
    folder: Path

    @property
    def done(self) -> bool:
        """Whether they exist and are complete."""
        manifest = read_manifest(self.folder)
        return manifest is not None and check_files(self.folder, manifest) is None

    def explain(self) -> str:
        """Why they have to be made: what differs from tokens of the same source in the same style that are there.

        Another style is no reason: phases that use a source in two styles have both in the cache, side by side.
        """
        others = [read_manifest(path.parent) for path in self.folder.parent.glob(f"*/{MANIFEST}")]
        made = [other["fingerprint"] for other in others if other]
        same = ("source", "style")
        near = [other for other in made if all(other.get(key) == self.fingerprint[key] for key in same)]
        if not near:
            return FIRST
        differences = min((find_differences(other, self.fingerprint) for other in near), key=len)
        return f"again, since they were made from something else: {'; '.join(differences)}"


def plan_preparation(source: SourceConfig, style: str, tokenizer: Tokenizer, cache: Path) -> Preparation:
    """What tokens of a source are made from: its records and how they are read, prompts, tokenizer."""
    found = scan(source)
    fingerprint = {
        "source": source.source,
        "records": found.hash,
        "schema": found.schema,
        # Texts and pairs know one style.
        "style": style if found.kind == "mcq" else "",
        "prompts": prompts.version(),
        "tokenizer": hash_tokenizer(tokenizer),
        "format": _find_format(tokenizer),
    }
    return Preparation(source, style, fingerprint, cache / "tokens" / hash_json(fingerprint)[:20])


def _find_format(tokenizer: Tokenizer) -> int:
    """2 where chat prompts, or the tokens that end them, may differ from those that format 1 wrote into the cache."""
    return 1 if not tokenizer.chat_template or "<end_of_turn>" in tokenizer.get_vocab() else 2


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    """What distinguishes a tokenizer from others: its words, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    parts = [words, str(tokenizer.chat_template), str(tokenizer.bos_token_id), str(tokenizer.eos_token_id)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def prepare(
    plan: Preparation,
    tokenizer: Tokenizer,
    on_progress: Progress = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> TokenStore:
    """The tokens of a source, made record by record unless they exist; `note` is given the reason why they are made."""
    if not plan.done:
        started, total = time.monotonic(), scan(plan.source).records
        why = plan.explain()
        note(f"tokens of {plan.source.source} are made {why}")
        with new_folder(plan) as folder:
            write_part(
                folder / "part-00000.arrow", stream(plan.source), plan.style, tokenizer, lambda n: on_progress(n, total)
            )
            finish(plan, folder)
        log.info("tokens of %s were made in %.1f s, %s", plan.source.source, time.monotonic() - started, why)
    return TokenStore(plan.folder)


@contextmanager
def new_folder(plan: Preparation) -> Iterator[Path]:
    """A folder next to the final one, to make tokens in; deleted at the end, unless `finish` has moved it."""
    folder = plan.folder.with_name(f".{plan.folder.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"storage.cache: {folder.parent} cannot be made: {error.strerror}; name a folder with room"
        ) from None
    try:
        yield folder
    finally:
        remove(folder)


def write_part(
    path: Path,
    records: Iterator[Record],
    style: str,
    tokenizer: Tokenizer,
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Tokenise records into one Arrow file, a few hundred at a time; returns how many there were."""
    done = 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, _SCHEMA) as writer:
        while chunk := list(islice(records, _CHUNK)):
            rendered = [
                prompts.render(record, style if isinstance(record, McqRecord) else "reasoning") for record in chunk
            ]
            tokens = tokenise(tokenizer, [example for examples in rendered for example in examples])
            columns: Mapping[str, Any] = {
                "ids": [each.ids for each in tokens],
                "prompt": [each.prompt for each in tokens],
                "is_text": [each.is_text for each in tokens],
                "first": [i == 0 for examples in rendered for i in range(len(examples))],
                "record": [record.id for record, examples in zip(chunk, rendered, strict=True) for _ in examples],
            }
            writer.write_batch(pyarrow.record_batch(columns, schema=_SCHEMA))
            done += len(chunk)
            on_progress(done)
    return done


def finish(plan: Preparation, folder: Path) -> None:
    """Seal tokens and move them to their final folder; the process that comes second deletes its own."""
    commit(folder, {"fingerprint": plan.fingerprint})
    if read_manifest(plan.folder) is not None and not plan.done:
        remove(plan.folder)  # torn: made again just now
    try:
        folder.rename(plan.folder)
    except OSError:
        if not plan.done:
            raise
