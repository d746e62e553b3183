"""Figures as files: well-formed, labelled with the report's own figures, whatever its names hold."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from medlora.evaluation.predictions import Prediction
from medlora.reporting.report import build_report
from medlora.reporting.results import files
from medlora.reporting.results.drawings import Drawings
from medlora.reporting.results.figures import write_figures
from medlora.reporting.results.files import write_results
from medlora.reporting.templates import clean, format_points
from tests.support.hostile import XSS
from tests.support.predictions import TWO_TESTS, answer

PHASE = {
    **{"name": "00", "description": "", "chain": "new", "sources": [], "replayed": [], "seconds": None},
    **{"tokens_per_s": None, "peak_memory_mib": None, "loss": [[1, 5.0], [2, 4.0]], "dev": [[2, 0.5]]},
}


def draw(folder: Path, predictions: list[Prediction], **about: Any) -> dict[str, ElementTree.Element]:
    report = build_report(predictions, about, seed=0)
    names = write_figures(folder / "figures", report, Drawings(report))
    assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(names)
    return {name: ElementTree.fromstring((folder / "figures" / name).read_bytes()) for name in names}


def read_texts(figure: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in figure.iter("{http://www.w3.org/2000/svg}text")]


def test_the_figures_have_the_reports_numbers(tmp_path: Path) -> None:
    predictions = [replace(p, probabilities=(0.4, 0.3, 0.2, 0.1)) for p in TWO_TESTS]
    report = build_report(predictions, {}, seed=0)
    figures = draw(tmp_path, predictions, phases=[PHASE])
    assert list(figures) == ["accuracy.svg", "changes.svg", "letters.svg", "calibration.svg", "training.svg"]
    texts = read_texts(figures["accuracy.svg"])
    for row in report["stages"]:
        low, high = (100 * end for end in row["interval"])
        assert f"{100 * row['accuracy']:.1f} ({low:.1f} to {high:.1f})" in texts
    (pair,) = [pair for pair in report["comparisons"] if pair["test"] == "two"]
    ends = " to ".join(format_points(pair[end]) for end in ("low", "high"))
    assert f"{format_points(pair['difference'])} ({ends})" in read_texts(figures["changes.svg"])
    assert {"00: training loss", "00: dev accuracy in %"} <= set(read_texts(figures["training.svg"]))


def test_a_figure_needs_nothing_else_and_holds_hostile_names_as_text(tmp_path: Path) -> None:
    payloads = [" ".join(each.split()) for each in XSS]
    nasty = " ".join(payloads) + " var(--ink) \x00\x1b"
    predictions = [
        replace(p, stage=p.stage + nasty, test=p.test + nasty, probabilities=(0.4, 0.3, 0.2, 0.1)) for p in TWO_TESTS
    ]
    figures = draw(tmp_path, predictions, phases=[{**PHASE, "name": f"00{nasty}"}])
    kept = {"svg", "rect", "text", "path"}
    for name, figure in figures.items():
        assert {element.tag.rpartition("}")[2] for element in figure.iter()} == kept, name
        attributes = {key for element in figure.iter() for key in element.attrib}
        assert not {key for key in attributes if key.startswith("on") or "href" in key}
        drawn = [element for element in figure.iter() if not element.tag.endswith("text")]
        assert "var(" not in " ".join(value for element in drawn for value in element.attrib.values())
        assert any(all(clean(payload) in text for payload in payloads) for text in read_texts(figure)), name


def test_what_is_not_there_has_no_figure(tmp_path: Path) -> None:
    assert list(draw(tmp_path, answer("base", "one", "AACDAACD"))) == ["accuracy.svg", "letters.svg"]


def test_the_page_links_to_the_figures_beside_it(tmp_path: Path) -> None:
    report = build_report(TWO_TESTS, {}, seed=0)
    write_results(tmp_path, report, TWO_TESTS, {})
    first = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        set(re.findall(r'href="figures/([^"]+)"', html)) == set(first) == {"accuracy.svg", "changes.svg", "letters.svg"}
    )
    write_results(tmp_path, report, TWO_TESTS, {})
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == first


def test_runs_side_by_side_are_drawn_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib's settings are the process's: what one thread sets, the other would draw with."""
    drawing: list[Path] = []

    def linger(folder: Path, report: Any) -> None:
        drawing.append(folder)
        time.sleep(0.05)
        assert drawing == [folder]
        drawing.remove(folder)

    monkeypatch.setattr(files, "write_tables", linger)
    report = build_report(TWO_TESTS, {}, seed=0)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: write_results(tmp_path / name, report, TWO_TESTS, {}), ("a", "b")))
    pages = [(tmp_path / name / "report.html").read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]
