"""Options that a text denies, doubts or rules out become marks of their own, which no verdict can read.

Works on the option characters of `text.normalise`. Each pattern has two examples: a text in which it finds a denied
option, and one in which it must find none; `tests/test_answers.py` tries both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

ANY = "[\ue000-\ue319\ue400]"


_HARD, _SOFT = 0xE500, 0xE600


DENIED = "[\ue500-\ue619]"
"""A denied option, whose letter is still known."""


_GLOSS = r"(?:\s*\([^()\n\ue000-\ue400]{0,60}\))?"


_BETWEEN = r"(?:\s*(?:,\s*(?:and|or|및|그리고)?|/|·|~|&|와|과|이?나|도|및|또는|혹은|이?거나|이?랑|하고|\b(?:and|n?or)\b)\s*(?:option\s+)?)"


# Atomic, since a run that is tried in all its parts would take exponential time.
_RUN = rf"(?P<run>(?>{ANY}{_GLOSS}(?:{_BETWEEN}{ANY}{_GLOSS}){{0,9}}))"


# The rest of a Korean clause: no other option, no end of a sentence, no word that begins the next clause.
_REST = r"(?:(?!므로|지만|외에|이외|말고|밖에|으나|[이하은는]고\s|이?며\s|[은는인]데|니까|라서|어서|때문|다고 해도|더라도)[^.,;:!?\n\ue000-\ue400])"


_NO = (
    r"(?:아[니닌님닙닐](?!면|라면|라고(?:는|도)? (?:할|볼) 수(?:는)? 없|까| 수(?:가|는)? 없)|수(?:는|도|가)?\s?없|리(?:가|는)?\s?없|"
    r"(?:기(?:는|가|에는|엔)?|보긴)\s?(?:어렵|힘들|곤란))"
)


_SOFT_NO = r"(?:틀[리렸린림립]|오답|부적절|부적합|잘못|그르다|안 [되된됩]|(?:지|지는|지도)\s?(?:않(?!을 수 없)|못|마|말)|금기|가능성[은이도]?\s*(?:낮|적|희박|없)|제외|배제|소거|탈락|거리가 멀|무관)"


_ABOUT = r"(?:은|는|이|가|도|을|를|만|인(?!데)|일(?!지|까)|라는|이라는|라고|이라고|라고는|이라고는|라고도|번은|로|으로)(?:\s*(?:선택지|보기)[은는이가도]?)?"


_CLAUSE = r"(?:(?!\b(?:but|so|therefore|thus|hence|because|since|and|while|whereas|then|which|leaves|leaving|except|than|what)\b)[^.,;:!?\n\ue000-\ue400])"


_VERB = (
    r"(?:is|are|was|were|would|could|should|might|may|can|does|(?-i:do)|did|has|have|seems?|looks?|appears?)"
    r"(?:\s+(?:be|been|clearly|definitely|also|probably|therefore|thus|likely|most likely|already|all|both|completely|simply|the))*"
)


@dataclass(frozen=True, slots=True)
class Denial:
    """A pattern that finds an option (`run`) which is not the answer; `hard` ones take an earlier verdict back."""

    name: str
    pattern: re.Pattern[str]
    denies: str
    leaves: str
    hard: bool = True


def _denial(name: str, pattern: str, denies: str, leaves: str, hard: bool = True) -> Denial:
    return Denial(name, re.compile(pattern, re.I), denies, leaves, hard)


DENIALS = (
    _denial(
        "set aside for another option",
        rf"{_RUN}(?:\s*[.)\]:]?\s*[^.,;:!?\n\ue000-\ue400은는]{{1,30}}?)?\s*(?:이|가|은|는|도|것이)?\s*아(?:니(?:라(?![고면서])|고|며)|닌)[,\s]*(?={ANY})",
        "정답은 2번 폐렴이 아니라 3번 결핵이다.",
        "정답은 3번 결핵이다.",
    ),
    _denial(
        "not, with the option's text between",
        rf"{_RUN}\s*[.)\]:]?\s+(?:(?!다른|나머지|선택지|보기|답)[^\s.,;:!?\ue000-\ue400]+(?<![은는])\s+){{0,3}}(?!다른|나머지|선택지|보기|답)"
        rf"[^\s.,;:!?\ue000-\ue400]+(?:이|가|은|는|도)\s*(?:결코|절대로?|전혀)?\s*아[니닌님닙닐](?!면|라고)",
        "정답은 ② 천식이 아니다.",
        "정답은 B. 다른 선택지는 정답이 아니다.",
    ),
    _denial(
        "not, in the same clause",
        rf"{_RUN}(?:번|항)?\s*(?:은|는|이|가|도|을|를|만|만이|라|일|인|에서|라고|이라|될|로|으로|라는|이라는)*{_REST}{{0,25}}?{_NO}",
        "B가 정답이라고는 할 수 없다.",
        "B가 정답이며 C는 아니다.",
    ),
    _denial(
        "asked and denied",
        rf"{_RUN}(?:이|가)?\s*(?:정답|답|맞)?(?:일까요?|인가요?|을까요?|이?냐|나요)?\s*\?\s*(?:아니|아닙|그렇지 않|no\b|not\b)",
        "B일까? 아니다.",
        "정답은 무엇일까? B이다.",
        hard=False,
    ),
    _denial(
        "wrong",
        rf"{_RUN}(?:번|항)?\s*(?:{_ABOUT})\s*{_REST}{{0,25}}?{_SOFT_NO}",
        "B는 적절하지 않다.",
        "정답은 C이다. 오답이 많은 문제였다.",
        hard=False,
    ),
    _denial(
        "no reason for it",
        rf"{_RUN}\s*이?라(?:는|고 할|고 볼)\s*\S{{1,8}}(?:은|는|이|가)\s*없",
        "정답이 B라는 근거는 없다.",
        "정답이 B라는 근거는 발열이다.",
    ),
    _denial(
        "all but",
        rf"{_RUN}\s*(?:을|를)?\s*(?:이?외의|제외한|뺀)\s*(?:것|다른|보기|선택지|나머지)",
        "B 외의 것이 정답이다.",
        "B 외에는 정답이 없다.",
        hard=False,
    ),
    _denial(
        "only looks right",
        rf"{_RUN}\s+(?:looks?|seems?|appears?|sounds?|is tempting)\b{_CLAUSE}{{0,25}},?\s*\bbut\s+(?:it\s+)?(?:is|was)?\s*(?:not\b|n't\b|wrong|incorrect)",
        "B looks right but is not.",
        "B looks right and is.",
        hard=False,
    ),
    _denial(
        "first thought",
        rf"\b(?:(?:first|initial|original|previous)\s+(?:answer|choice|thought|guess|idea)\s+was|I\s+(?:initially|first|originally|had)\s+"
        rf"(?:said|chose|thought|answered|picked|guessed))\s+(?:it was\s+|of\s+)?(?:option\s+)?{_RUN}(?!\s+and\s+(?:it|that) is)",
        "My first answer was B.",
        "My final answer is B.",
        hard=False,
    ),
    _denial(
        "judged wrong",
        rf"{_RUN}(?:\s*[:\-–—(]\s*|\s+)(?:오답|틀[림린]|부적절|부적합|잘못|금기|제외|wrong|incorrect)(?=\s*(?:[,.;/\n)]|\Z|이[다고므며]|하))",
        "B 오답, C 정답",
        "B 정답, C 오답",
        hard=False,
    ),
    _denial(
        "supposed",
        rf"{_RUN}(?:번|항)?\s*(?:이|가|을|를|은|는)?\s*(?:정답|답)?(?:인 줄 알|일 것 같(?:았?지만|았?으나|은데)|처럼 보이[지나]|[으]?로 보이(?:지만|나)|"
        r"(?:이?라고|으?로)\s*(?:(?:생각|판단|답|말)(?:하기 쉽|하기 쉬|했[지으]|했는데|하였[지으]|할 수(?:도)? 있)|착각|오해|오인|혼동|여기기 쉽|했지만|했으나|하려다)|(?:을|를)?\s*(?:골랐|선택했|고르)(?:지만|으나|었지만))",
        "정답은 B인 줄 알았다.",
        "정답은 B라고 생각한다.",
        hard=False,
    ),
    _denial(
        "set aside before another option",
        r"(?:\binstead of|\brather than|\bneither|\band not|\bnot|\bover)\s+(?:the\s+)?(?:option\s+|choice\s+)?"
        rf"{_RUN}[.,;]?\s*(?:\bbut\s*(?:rather\s+)?)?(?={ANY})",
        "It is not C but D.",
        "It is C but not certain.",
    ),
    _denial(
        "not, before the option",
        r"(?:\b(?:not|never|cannot|neither|nobody|hardly|doubt|unlikely|reject(?:ed)?|discard(?:ed)?|dismiss(?:ed)?|avoid|"
        r"wrong about|rul(?:ed?|ing) out|exclud(?:ed?|ing)|eliminat(?:ed?|ing)|(?:no|wrong|mistake) (?:one|way|to)|"
        r"no longer|(?:every(?:one|thing)|anything|all) (?:but|except)|except(?: for)?)\b|n't\b)"
        rf"(?!\s+(?:sure|certain|only|a doctor|an? \w+,|(?:\w+ ){{0,2}}(?:option|choice|statement|one|true|correct|indicated|recommended|appropriate) (?:is|are)\b))"
        rf"{_CLAUSE}{{0,40}}?\b{_RUN}".replace(rf"\b{_RUN}", _RUN),
        "I don't think the answer is B.",
        "I am not sure but the answer is B.",
    ),
    _denial(
        "not, behind the option",
        rf"{_RUN}\s*(?:(?:alone|itself)\s+)?(?:{_VERB}(?:n't|\s+(?:not|never|wrong|incorrect|false|hardly|unlikely|excluded|out|eliminated|"
        r"ruled out|contraindicated|inappropriate|no)\b)|cannot\b|can't\b|won't\b)(?!\s+(?:only|until|sure))",
        "B is definitely not the answer.",
        "B is the answer and C is not.",
        hard=False,
    ),
    _denial(
        "a mistake to choose",
        rf"\b(?:choosing|picking|selecting)\s+(?:option\s+)?{_RUN}\s+(?:would be|is)\s+(?:a mistake|wrong|an error)",
        "Choosing B would be a mistake.",
        "Choosing B is right.",
    ),
)


def mark_denied(text: str) -> str:
    """Text whose denied options are marks; those that make way for another option at once are gone."""
    for denial in DENIALS:
        text = denial.pattern.sub(_mark(denial), text)
    return text


_GIVEN = re.compile(r"(?:답(?:안|변)?(?:은|는|:)?|answer(?:\s+is|:))\s*\Z", re.I)


EXAMPLES = {"_GIVEN": ("정답은 ", "정답은 아마도 ")}
"""A text that a pattern must read, and one that it must not; tests/test_patterns.py tries both."""


def _mark(denial: Denial) -> Callable[[re.Match[str]], str]:
    def replace(match: re.Match[str]) -> str:
        if denial.name.startswith("set aside"):
            return ""
        start, end = match.span("run")
        # "The answer is B, C is wrong": only the last option of the run is.
        if not denial.hard and _GIVEN.search(match.string, max(0, start - 40), start):
            start += re.search(rf"(?:{ANY}{_GLOSS},\s*){{0,9}}", match["run"]).end()  # type: ignore[union-attr]
        run = re.sub(ANY, lambda option: _denied(option[0], denial.hard), match.string[start:end])
        return match.string[match.start() : start] + run + match.string[end : match.end()]

    return replace


def _denied(option: str, hard: bool) -> str:
    return "\ue6ff" if option == "\ue400" else chr((_HARD if hard else _SOFT) + (ord(option) & 0xFF))


def find_denials(text: str, option: int) -> list[tuple[int, bool]]:
    """Where `text` denies that option, and whether it states outright that the option is not the answer."""
    marks = {chr(_HARD + option): True, chr(_SOFT + option): False}
    return [(place, marks[mark]) for place, mark in enumerate(text) if mark in marks]
