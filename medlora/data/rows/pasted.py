"""A question as people paste it: a stem, then its options in lines of their own, each behind its mark."""

from __future__ import annotations

from medlora.data.rows.option_lists import list_options
from medlora.data.rows.option_marks import read_mark
from medlora.records import LETTERS, McqRecord, RecordError


def read_pasted(text: str) -> McqRecord:
    """The question; its right answer is not known, so the record names the first option.

    Raises RecordError where no line begins the options with a first mark (A. 1) ① 가.), or they are not in order.
    """
    lines = [line for line in text.strip().splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if i and (mark := read_mark(line)) is not None and mark.place == 1]
    error = RecordError("no line begins options with A., 1) or ① below a question", "no options")
    for start in starts:
        try:
            options, _ = list_options("\n".join(lines[start:]), "options")
        except RecordError as found:
            error = found
            continue
        if len(options) >= 2:
            return McqRecord("pasted", "\n".join(lines[:start]), tuple(map(str, options)), LETTERS[0])
    raise error
