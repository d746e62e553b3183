"""The keys of a config for data: sources, the columns of their rows, what training data may hold."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medlora.config.base import Name, PlainStyle, Section


class AnswerColumn(Section):
    """Where the right answer is, and how its numbers count."""

    column: str
    base: Literal["data", 0, 1] = "data"
    """Number of the first option. `data`: 0 or 1, whichever the column shows (a 0, or as many as there are options);
    where it shows neither or both, reading stops and asks."""


class Columns(Section):
    """The columns of a record, for rows that no known schema fits: of a text, a translation or a question."""

    id: str | None = None
    text: str | None = None
    english: str | None = None
    korean: str | None = None
    question: str | None = None
    options: str | tuple[str, ...] | None = None
    """A column for each option in order, or the one column that holds them as a list or mapping."""
    answer: str | AnswerColumn | None = None
    """A letter, a number, the option's text, or a list of one of these."""
    subject: str | None = None
    rationale: str | None = None

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        kinds = {
            "text": (self.text,),
            "english, korean": (self.english, self.korean),
            "question, options, answer": (self.question, self.options, self.answer),
        }
        begun = [name for name, columns in kinds.items() if any(columns)]
        if len(begun) != 1 or not all(kinds[begun[0]]):
            raise ValueError(
                f"name all columns of exactly one kind: {' | '.join(kinds)}; found {', '.join(begun) or 'none'}"
            )
        return self


class SourceConfig(Section):
    """Where records come from."""

    source: str
    """File (.jsonl .json .csv .tsv .parquet .txt, also .gz or .zst of them, .xlsx), folder, glob, or `s3://` or `gs://`
    URI. Also `hf:owner/name/config:split@revision`, `miniature:NAME`, or two aligned text files as `ENGLISH|KOREAN`."""
    kind: Literal["auto", "text", "translation", "mcq"] = "auto"
    """What the rows are; `auto` looks at the columns."""
    adaptor: str | None = None
    """Name of a known schema (`medlora inspect --schemas` lists them); unset = found by looking at the columns."""
    columns: Columns | None = None
    """Names of columns where no known schema fits, e.g. `{question: stem, options: [a, b, c, d], answer: {column: key, base: 0}}`."""
    limit: int | None = Field(None, ge=1)
    """Use the first so many records."""
    unicode: Literal["keep", "nfc"] = "keep"
    """`nfc`: what the model sees is composed (Unicode NFC), too; matching always is."""
    encoding: Literal["auto", "utf-8", "cp949", "euc-kr", "utf-16"] = "auto"
    """How the text of a file is encoded; `auto` is UTF-8, unless the first bytes are surely Korean CP949 or UTF-16."""
    separator: Literal["auto", ",", ";", "tab", "|"] = "auto"
    """What separates the cells of a CSV; `auto` looks at its first rows."""
    licence: str | None = None
    """What the data may be used for, e.g. `CC BY-NC 2.0`; written into the run's data card."""

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if self.adaptor and self.columns:
            raise ValueError("adaptor, columns: give one of them")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, object]:
        # Dumps are part of the fingerprints of finished runs: a key that came later must not make them look changed.
        later = {"adaptor": None, "columns": None, "unicode": "keep", "licence": None, "sample": None}
        later |= {"encoding": "auto", "separator": "auto"}
        dumped: dict[str, object] = serialise(self)
        return {key: value for key, value in dumped.items() if key not in later or value != later[key]}


class TrainSource(SourceConfig):
    """A source to train on."""

    weight: float | None = Field(None, gt=0)
    """Share of the examples (or tokens: `weights` of the phase) relative to the other weighted sources; without weights
    every example is seen once an epoch."""
    style: PlainStyle = "reasoning"
    """Prompt style of MCQs."""
    sample: int | None = Field(None, ge=1)
    """Use a seeded sample of at most so many records."""


class TestConfig(SourceConfig):
    """A test that the finished stages are scored on and that nothing else ever reads."""

    __test__: ClassVar[bool] = False  # for pytest, which collects what is named so

    name: Name
    subject: str | None = None
    """Column that names the subject of a question; unset = the schema's own."""


class FewShot(SourceConfig):
    """Solved questions that every prompt shows first; never the test itself."""

    k: int = Field(5, ge=1)
    """How many."""
    choose: Literal["first", "seeded"] = "first"
    """The source's first k, as lm-evaluation-harness does, or k drawn with the run's seed."""


class ReadingConfig(Section):
    """What to do with rows that make no record."""

    max_bad_fraction: float = Field(0.0, ge=0, lt=1)
    """Most of a source's rows that may be no valid records; they go to quarantine.jsonl, are counted, and left out."""


class DataConfig(ReadingConfig):
    """What training data may hold."""

    overlap: Literal["stop", "drop", "allow"] = "stop"
    """Training records that hold questions of a test or of dev: `stop` before training, `drop` them, or `allow` them,
    which every report made from the run repeats."""
    dedupe: bool = False
    """Leave out repeats of an earlier record of the same source; they are counted in any case."""
    max_personal: int = Field(0, ge=0)
    """Most places that may look like personal data: resident registration, phone and record numbers, e-mail addresses."""
