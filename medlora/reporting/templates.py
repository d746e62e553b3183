"""The jinja environment of the pages, how numbers are written in them, and the short texts of exports."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import yaml

from medlora.reporting.report import is_by_likelihood

if TYPE_CHECKING:
    from markupsafe import Markup

_FOLDER = Path(__file__).parent / "templates"


def fill_text(template: str, **values: str) -> str:
    """A short text with its `$names` filled in."""
    return Template(read_template(template)).substitute(values)


def read_template(name: str) -> str:
    """A file that comes with the pages, as it is."""
    return (_FOLDER / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Script:
    """A script that comes with medlora, for a page whose policy allows it alone."""

    text: Markup
    source: str
    """As a Content-Security-Policy names it."""


def load_script(name: str) -> Script:
    """A script of the pages with the hash that allows exactly it."""
    from markupsafe import Markup

    text = read_template(name)
    return Script(Markup(text), f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}")


@cache
def make_environment() -> Any:
    """The templates of the pages, everything escaped, with the filters that write numbers; made and compiled once."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["by_likelihood"] = is_by_likelihood
    environment.filters |= {
        "percent": format_percent,
        "points": format_points,
        "forgotten": describe_forgotten,
        "p": format_p,
        "number": format_number,
        "yaml": lambda value: yaml.safe_dump(value, allow_unicode=True, sort_keys=False, width=100),
        "lang": lambda text: "ko" if any("가" <= letter <= "힣" for letter in text) else "en",
        "clean": clean,
    }
    return environment


def format_percent(share: float | None, digits: int = 1) -> str:
    """0.4523 -> "45.2"; None -> a dash."""
    return "\N{EN DASH}" if share is None else f"{100 * share:.{digits}f}"


def format_points(difference: float | None) -> str:
    """A difference of shares in percentage points, with its sign: 0.093 -> "+9.3"."""
    if difference is None:
        return "\N{EN DASH}"
    return f"{100 * difference:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0").replace("-", "\N{MINUS SIGN}")


def describe_forgotten(forgotten: float | None) -> str:
    """What was lost since the best earlier stage, in words: 0.028 -> "lost 2.8", -0.028 -> "gained 2.8"."""
    if forgotten is None:
        return "\N{EN DASH}"
    size = f"{100 * abs(forgotten):.1f}"
    return "as before" if size == "0.0" else f"{'lost' if forgotten > 0 else 'gained'} {size}"


def format_p(p_value: float, named: str = "p") -> str:
    """A p-value as journals print it: "p < 0.001", "p = 0.012", "p = 0.41"; with `named` empty, without the sign "="."""
    sign, number = ("<", "0.001") if p_value < 0.001 else ("=", f"{p_value:.{3 if p_value < 0.095 else 2}f}")
    words = [named, sign, number] if named else [number] if sign == "=" else [sign, number]
    return "\N{NO-BREAK SPACE}".join(words)


def format_number(value: object) -> str:
    """An int with separators, a float with up to two decimals, anything else as it is written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}".rstrip("0").rstrip(".")


_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Text without control characters, which HTML cannot hold."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
