"""What a release says of itself is the same everywhere."""

from __future__ import annotations

import re
import tomllib
from datetime import date

import yaml

from medlora import __version__
from tests.support import ROOT


def test_every_file_names_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = re.findall(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert project["version"] == citation["version"] == changes[0][0] == __version__
    assert changes[0][1] == citation["date-released"] and date.fromisoformat(changes[0][1])
    image = (ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8")
    assert f"medlora:{__version__}" in image


def test_the_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert all(author.get("name") or author.get("family-names") for author in citation["authors"])
