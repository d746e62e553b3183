"""A report -> the table of a paper, as Markdown, LaTeX and csv."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medlora.evaluation.reports import OverallRow, PairRow, Report, StageRow

TABLES = ("table.md", "table.tex", "table.csv")
"""The files that `write_tables` writes."""

_HEADS = ("Test", "Stage", "n", "Right, %", "95 % interval", "Chance, %", "Change, points", "95 % interval", "Holm p")

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def write_tables(folder: Path, report: Report) -> None:
    """Write `table.md`, `table.tex` and `table.csv`, see `make_tables`."""
    for name, text in make_tables(report).items():
        (folder / name).write_text(text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


def make_tables(report: Report) -> dict[str, str]:
    """Each table by the name of its file: a row for each stage and test, then all tests together."""
    lines = [_make_cells(row) for row in list_rows(report)]
    first = report["overall"][0]["stage"]
    note = (
        "Right answers in % of all questions, with Wilson 95 % intervals; unparsed and failed answers count as wrong. "
        f"Change: against {first} on the same questions, with a paired bootstrap interval and Holm's corrected McNemar test."
    )
    texts = (_write_markdown(lines, report, note), _write_latex(lines, report, note), _write_csv(report))
    return dict(zip(TABLES, texts, strict=True))


def list_rows(report: Report) -> list[dict[str, Any]]:
    """The rows of the table as plain numbers; `test` is "all tests" in the rows that hold all of them."""
    first = report["overall"][0]["stage"]
    pairs = {(pair["test"], pair["after"]): pair for pair in report["comparisons"] if pair["before"] == first}
    rows = [
        _make_row(row["test"], row, row["accuracy"], pairs.get((row["test"], row["stage"]))) for row in report["stages"]
    ]
    if len({row["test"] for row in report["stages"]}) > 1:
        rows += [
            _make_row("all tests", row, row["micro"], pairs.get((None, row["stage"]))) for row in report["overall"]
        ]
    order = list(dict.fromkeys(row["test"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["test"]))


def _make_row(test: str, row: StageRow | OverallRow, accuracy: float, pair: PairRow | None) -> dict[str, Any]:
    of_test: Mapping[str, Any] = row  # only rows of a single test have these
    kept, calibration = of_test.get("format_kept") or {}, of_test.get("calibration") or {}
    change: Mapping[str, Any] = pair or {}
    return {
        "test": test,
        "stage": row["stage"],
        "n": row["n"],
        "correct": row["correct"],
        "accuracy": accuracy,
        "low": row["interval"][0],
        "high": row["interval"][1],
        "chance": row["chance"],
        "unparsed": row["unparsed"],
        "failed": row["failed"],
        "macro": row["macro"],
        "compared_with": change.get("before"),
        "difference": change.get("difference"),
        "difference_low": change.get("low"),
        "difference_high": change.get("high"),
        "gained": len(change["gained"]) if change else None,
        "lost": len(change["lost"]) if change else None,
        "p_mcnemar": change.get("p_value"),
        "p_holm": change.get("p_holm"),
        "format_kept": kept.get("answers"),
        "format_kept_accuracy": kept.get("accuracy"),
        "ece": calibration.get("ece"),
    }


def _make_cells(row: Mapping[str, Any]) -> list[str]:
    compared = row["difference"] is not None
    return [
        row["test"],
        row["stage"],
        f"{row['n']:,}",
        _percent(row["accuracy"]),
        f"{_percent(row['low'])} to {_percent(row['high'])}",
        _percent(row["chance"]),
        _points(row["difference"]) if compared else "",
        f"{_points(row['difference_low'])} to {_points(row['difference_high'])}" if compared else "",
        ("< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}") if compared else "",
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _points(difference: float) -> str:
    shown = f"{100 * difference:+.1f}"
    return "0.0" if shown in ("+0.0", "-0.0") else shown


def _write_markdown(lines: Sequence[Sequence[str]], report: Report, note: str) -> str:
    rows = [
        "| " + " | ".join(_HEADS) + " |",
        "|" + "|".join(":--" if i < 2 else "--:" for i in range(len(_HEADS))) + "|",
        *("| " + " | ".join(map(_escape_markdown, line)) + " |" for line in lines),
    ]
    return "\n".join([*rows, "", _escape_markdown(report.get("verdict", "")), "", _escape_markdown(note), ""])


def _escape_markdown(text: str) -> str:
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#$~])", r"\\\1", plain)


def _write_latex(lines: Sequence[Sequence[str]], report: Report, note: str) -> str:
    rows: list[str] = []
    for i, line in enumerate(lines):
        if i and line[0] != lines[i - 1][0]:
            rows.append(r"\midrule")
        rows.append(" & ".join(map(_escape_latex, line)) + r" \\")
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}; compile with XeLaTeX or LuaLaTeX where names are Korean.",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape_latex(report['verdict'])} {_escape_latex(note)}}}",
            rf"\begin{{tabular}}{{ll{'r' * (len(_HEADS) - 2)}}}",
            r"\toprule",
            " & ".join(map(_escape_latex, _HEADS)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _escape_latex(text: str) -> str:
    plain = "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
    return re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", plain)


def _write_csv(report: Report) -> str:
    rows = list_rows(report)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _disarm(value) if isinstance(value, str) else value for key, value in row.items()})
    return text.getvalue()


def _disarm(text: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
