"""All files of an evaluation that people read, written into one folder."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from medlora.evaluation.ledger import PAGE, REPORT
from medlora.evaluation.predictions import Prediction
from medlora.evaluation.reports import Report
from medlora.records import McqRecord
from medlora.reporting.page import Beside, write_page
from medlora.reporting.results.browse import BROWSE, write_browse_page
from medlora.reporting.results.drawings import Drawings
from medlora.reporting.results.figures import FOLDER, write_figures
from medlora.reporting.results.paper import write_tables
from medlora.runs.files import write_json

_DRAWING = threading.Lock()
"""matplotlib's settings and its first import are the whole process's: runs side by side draw one after another."""


def write_results(
    folder: Path,
    report: Report,
    predictions: Sequence[Prediction],
    questions: Mapping[str, Sequence[McqRecord]],
) -> None:
    """Write `report.json`, `report.html`, `questions.html`, the tables and the figures of a report and its predictions."""
    with _DRAWING:
        draw = Drawings(report)
        write_json(folder / REPORT, report)
        write_tables(folder, report)
        write_browse_page(folder / BROWSE, report, predictions, questions)
        figures = [f"{FOLDER}/{name}" for name in write_figures(folder / FOLDER, report, draw)]
        write_page(folder / PAGE, report, predictions, questions, Beside(BROWSE, figures), draw)
