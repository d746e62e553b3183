"""What an attacker would write: into pages, into names, into pickles."""

from __future__ import annotations

import pickle
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

XSS = (
    "<script>alert(1)</script>",
    "<ScRiPt>alert(1)</sCrIpT>",
    "<script src=//evil.example/x.js></script>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "</script><script>alert(1)</script>",
    '"><script>alert(1)</script>',
    "'><script>alert(1)</script>",
    '"><img src=x onerror="alert(2)">',
    "<img src=x onerror=alert(1)>",
    "<img/src='x'/onerror=alert(1)>",
    "<img src=x:x onerror=eval(atob('YWxlcnQoMSk='))>",
    '<IMG """><SCRIPT>alert(1)</SCRIPT>">',
    "<svg onload=alert(1)>",
    "<svg/onload=alert(1)//",
    "<svg><script>alert(1)</script></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<svg><a xlink:href='javascript:alert(1)'><text>x</text></a></svg>",
    "</svg><img src=x onerror=alert(1)>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<body onload=alert(1)>",
    "<iframe src='javascript:alert(1)'></iframe>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<object data='javascript:alert(1)'></object>",
    "<embed src='data:text/html,<script>alert(1)</script>'>",
    "<a href='javascript:alert(1)'>x</a>",
    "<a href='data:text/html;base64,PHNjcmlwdD4='>x</a>",
    "<form action='javascript:alert(1)'><button>x</button></form>",
    "<input autofocus onfocus=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<video><source onerror=alert(1)></video>",
    "<audio src=x onerror=alert(1)>",
    "<marquee onstart=alert(1)>",
    "<meta http-equiv=refresh content='0;url=javascript:alert(1)'>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<base href=//evil.example/>",
    "</style><style>*{display:none}</style>",
    "<style>@import '//evil.example/x.css';</style>",
    "<div style='background:url(javascript:alert(1))'>",
    "</title><script>alert(1)</script>",
    "<!-- </title> ]]> -->",
    "--><script>alert(1)</script><!--",
    "<![CDATA[<script>alert(1)</script>]]>",
    "</textarea><script>alert(1)</script>",
    "<template><script>alert(1)</script></template>",
    '" onmouseover="alert(1)" x="',
    "' onmouseover='alert(1)' x='",
    "` onmouseover=alert(1) `",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    "{{ 7 * 7 }} {% raw %} ${7*7} <%= 7*7 %> $\\frac{1}{2}$",
    "javascript:alert(3)",
)
"""Texts that would run or load something on a page that takes them for markup; on ours they are text."""

NAMES = (
    "",
    ".",
    "..",
    "...",
    "~",
    "-",
    "-rf",
    "_x",
    ".hidden",
    "../x",
    "../../etc/passwd",
    "..\\x",
    "a/../../b",
    "a/b",
    "/etc/passwd",
    "C:\\x",
    "\\\\host\\share",
    "a\\b",
    "a b",
    " a",
    "a ",
    "a\n",
    "a\nb",
    "a\tb",
    "a\r",
    "a\0b",
    "a;b",
    "a|b",
    "a&b",
    "a>b",
    "$x",
    "$(id)",
    "`id`",
    "${HOME}",
    "a*",
    "a?",
    "%2e%2e%2fx",
    "a:b",
    "x" * 65,
    "가",
    "a\u202eb",
    "a\u2024\u2024b",
)
"""Names that could leave their folder, reach a shell, or pass for another."""


class Exploit:
    """What unpickling turns into a file at `marker`: the sign that foreign code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def write_pickle(path: Path, marker: Path) -> None:
    """A pickle that writes `marker` when it is loaded."""
    path.write_bytes(pickle.dumps(Exploit(marker)))


class Markup(HTMLParser):
    """The elements, attribute names and text of a page, white space as one space."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str | None] = set()
        self.texts: list[str] = []
        self.feed(html)
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value for name, value in attrs if name == "href"}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
