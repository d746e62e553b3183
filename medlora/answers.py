"""What a model wrote -> the option letter it meant, or None; and how well it kept the completion format.

`parse` reads in three steps, as a careful reader does:

1. *Normalise* (`option_text`): an option becomes one character, whatever its spelling; what only looks like one goes.
2. *Collect* verdicts: who says "the answer is", where, and how strongly. One that is denied, conditional, asked or
   shared between two options is none.
3. *Decide*: the strongest kind of verdict speaks. Where verdicts of that kind differ, the last one does if the model
   turned or concluded in between, and nobody otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from medlora.option_text import ANY, MARKED, OPTION, PLAIN, SEVERAL, TICKED, index_of, normalise, one_turn
from medlora.records import LETTERS

# ---- collect --------------------------------------------------------------------------------------------------------

_STRONG, _MIDDLE, _WEAK = 3, 2, 1


@dataclass(frozen=True, slots=True)
class _Verdict:
    start: int
    end: int
    option: int | None  # None: a verdict that names several options
    strength: int


_GLOSS = r"(?:\s*\([^()\n]{0,60}\))?"
_FILL = (
    r"(?:(?:therefore|thus|probably|most likely|likely|clearly|definitely|indeed|still|simply|in fact|"
    r"actually|option|choice|letter|"
    r"number|answer|the|as follows|선택지|보기|옵션|번호|아마도?|바로|역시|결국|당연히|확실히|명백히|"
    r"다음과 같습니다|다음과 같다|"
    r"최종적으로)[\s:.,]*)*[(\[{<]?"
)
_KOREAN_CUE = (
    r"(?<!틀린 )(?<!못된 )(?:정답|해답|최종\s?답[안변]?|(?<![가-힣])(?:제|내)?\s?답[안변]?|"
    r"(?<![가-힣])(?:최종\s*)?(?:결론|선택|판단)|정정|수정)"
    r"(?!지|률|을|를|과)"
)
_ENGLISH_CUE = (
    r"\b(?:answers?(?!\s*(?:choices|options))(?:\s+(?:choice|option|key))?|ans|choice|solution|verdict|"
    r"conclusion|correction|"
    r"(?:correct|best|right|appropriate|suitable|accurate|likely|final|my|selected|chosen)\s+(?:option|choice|selection|"
    r"response|one))\b\.?"
)
# "the correct option completing the statement is": words between an English cue and its verb.
_VERB = r"(?P<gap>[^.,:;?!\n\ue000-\ue400]{0,80}?)\b(?:is|are|was|be|becomes|remains)\b\s*[:\-–—]*\s*"
_CUED = re.compile(
    rf"(?:{_KOREAN_CUE}\s*(?:\([^()\n]{{0,20}}\))?\s*(?:[은는이가]|으로는|로는)?\??\s*[:;=)\-–—→>.…]*\s*"
    rf"|{_ENGLISH_CUE}(?:\s*\([^()\n]{{0,20}}\))?(?:{_VERB}|\s*[:;=)\-–—→>]+\s*|\s*\n\s*|\s+(?={ANY}\W*(?:\n|\Z))))"
    rf"{_FILL}(?P<option>{ANY})",
    re.I,
)
# "정답은 폐렴(B)입니다", "the answer is pneumonia (B)": the option's text first, then its letter in brackets.
_CUED_TEXT = re.compile(
    rf"(?:{_KOREAN_CUE}\s*(?:[은는]|:)|{_ENGLISH_CUE}\s*(?:\bis\b|"
    rf":))\s*(?P<gap>(?:[^.?!\n\ue000-\ue400]|\.(?=\d)){{1,60}}?)"
    rf"(?:(?P<option>{MARKED})|,\s*(?:즉|option|선택지)\s*(?P<named>{ANY}))",
    re.I,
)
_SAID = r"(?:바로|가장|제일|유일한|올바른|옳은|최종|명백한|확실한|이 문제의|문제의)*\s*"
_OPTION_FIRST = re.compile(
    rf"(?P<option>{ANY}){_GLOSS}\s*(?:(?:선택지|보기|옵션)\s*)?(?:"
    rf"(?:이|가|은|는|만|만이|이야말로)\s*{_SAID}(?:정답|답(?=이|입|임|으로|다|\W)|최종 답)|(?:이라고|"
    r"라고)\s*(?:답|결론)"
    r"|(?:을|를|로|으로|이라고|라고)\s*(?:최종\s*)?(?:정답|답)?(?:으로)?\s*(?:선택(?!한 (?:사람|학생|"
    r"경우))|정정|수정|변경|고르|고릅|골랐|고른|골라|택하|택합|결정|답하|답합|판단)"
    r"|,?\s+(?:is|would be|must be|should be|as)\s+(?:clearly |therefore |thus |indeed |definitely |"
    r"probably |most likely |likely )?"
    r"(?:(?:the|my|our|a)\s+)?(?:single\s+|best\s+|most\s+|correct\s+|right\s+|final\s+|likely\s+|"
    r"appropriate\s+|accurate\s+)*"
    r"(?:answer|choice|option|response)\b)",
    re.I,
)
_OPTION_TEXT_FIRST = re.compile(
    rf"(?:^|[.\n]\s*|따라서,?\s*|그러므로,?\s*)(?P<option>{OPTION})(?:[.):]\s*|"
    rf"\s+)[^.\n\ue000-\ue400]{{1,40}}?[이가]\s+정답"
)
_CHOSEN = re.compile(
    r"\b(?:choos(?:e|ing)|chose|pick(?:ing)?|select(?:ing)?|go(?:ing)? (?:with|for)|went with|opt for|"
    rf"settle on)\s+{_FILL}"
    rf"(?P<option>{ANY})|(?:고르자면|고른다면|고르라면|선택하자면|선택한다면|"
    rf"골라야 한다면),?\s*{_FILL}(?P<named>{ANY})",
    re.I,
)
_END = (
    rf"(?={_GLOSS}\s*(?:[.,!;:\n]|\Z|입니다|이다|다(?![가-힣])|임(?![가-힣])|예요|이에요|이야|"
    r"[이가] 맞|라고|로 (?:보|판단)))"
)
_CORRECTED = re.compile(
    r"(?:(?:^|[,.!?…\n]\s*)아니(?:다|요|야)?[,.…!]+|정정(?:하면|합니다|하겠습니다)?|다시 (?:보면|보니|"
    r"생각[가-힣]*|계산[가-힣]*)|\b(?:actually|wait|no|sorry)\b|"
    rf"\bcorrection)[\s,:.…]*[^.\n\ue000-\ue400]{{0,20}}?(?P<option>{OPTION}){_END}",
    re.I,
)
_CONCLUDED = re.compile(
    r"(?:따라서|그러므로|그래서|결국|결론적으로|고로|므로|\b(?:therefore|thus|hence|"
    r"so))[,:\s]+(?:(?:it|that)(?:'s| is| must be| would be)\s+)?"
    rf"{_FILL}(?P<option>{OPTION}){_END}",
    re.I,
)
# "제 생각에는 D입니다", "it's D": a sentence that says nothing but an option.
_STATED = re.compile(
    r"(?:^|[.!?,:\n]\s*|생각(?:에|으로)[는은]?\s*|저는\s*|이는\s*|아마도?\s*|따라서,?\s*|않지만,?\s*|"
    rf"않으나,?\s*)(?:선택지\s*|보기\s*|바로\s*)?(?P<option>{OPTION}){_GLOSS}\s*"
    r"(?:입니다|이다|예요|이에요|일 것(?:입니다|이다| 같)|인 것 같습|이?라고 (?:생각합|생각한|판단|봅)|"
    r"같습니다|에 해당(?:합|한|됩|된)|[와과] 일치)"
    r"|\b(?:it's|it is|that (?:would be|is)|I(?:'d| would) say|I (?:believe|think)|definitely|probably|"
    r"most likely|answer's|(?:if I had )?to (?:choose|guess|pick),|lean(?:ing)? towards?)"
    rf"\s+{_FILL}(?P<named>{OPTION}){_END}|\b(?:corresponds to|matches|consistent with) (?:the )?(?:option|"
    rf"choice) (?P<last>{OPTION}){_END}",
    re.I,
)
# What says which option is right without saying "answer"; a review of every option says it too, so these are weak.
_IS_RIGHT = re.compile(
    r"(?:(?:것|설명|진단|치료|처치|검사|약물|원인|선택지|보기|옵션|"
    rf"가장 [^.,\n\ue000-\ue400]{{1,30}}?)[은는]\s*{_FILL}(?P<option>{ANY}){_END}"
    rf"|(?P<named>{OPTION}){_GLOSS}\s*(?:(?:선택지|보기|옵션)\s*)?(?:이|가|만|만이)\s*[^.,\n\ue000-\ue400]{{0,20}}?"
    r"(?<![부불])(?:맞|옳|적절|적합|타당|해당|올바|정확|최선|우선)(?![^.\n]{0,8}(?:지 않|지 못|수 없|지만|어렵))"
    rf"|\b(?:most|best)\s[^.,:;\n\ue000-\ue400]{{1,60}}\b(?:is|be)(?:: ?|"
    rf" )(?:(?:[^.;\n\ue000-\ue400]{{0,60}} )?(?P<last>{MARKED})"
    rf"|(?:[^.;\n\ue000-\ue400]{{0,60}} )?option (?P<also>{OPTION}){_END}|(?P<plain>{PLAIN}){_END})"
    rf"|(?P<first>{OPTION}){_GLOSS}\s+(?:is|seems|looks|appears)\s+(?:to be )?(?:clearly |therefore |thus |"
    r"the |most |best )*(?:correct|right|true|"
    r"appropriate|accurate|best)\b(?!\s+for the))",
    re.I,
)
_BARE = re.compile(
    r"^\s*(?:(?:(?:질문|문제|문항|question|Q)\s*)?[\d\ue300-\ue309]{1,3}[.):]\s*|(?:option|choice|"
    r"선택지|보기)\s+|(?:=>|[→⇒∴])\s*|\ue000:\s*)?"
    rf"({ANY})[.)\]:,;]*\s*(?:입니다|이다|다|임|예요|이에요)?[.!]*\s*$",
    re.M | re.I,
)
_OPENING = re.compile(
    rf"(?:(?:option|choice|선택지|보기)\s+)?({OPTION})(?:\s*[.):;,](?!\s*{ANY})|\s+[-–—:]\s|\s*\(|"
    r"\s*(?:입니다|이다|예요|이에요|임|다)(?![가-힣])|\s+(?:because|since)\b"
    rf"|(?<={MARKED})\s+\S|\s+[가-힣][^\n.?\ue000-\ue400]{{0,40}}(?<![다요])\Z)",
    re.I,
)
_LABELLED = re.compile(rf"^\s*(?:(?:option|선택지|보기)\s*)?({OPTION})\s*[.):]\s*\S", re.M | re.I)

# Behind an option: what takes the verdict back, makes it a condition or a question, or shares it with another option.
_NOT_MEANT = re.compile(
    rf"{_GLOSS}\s*(?:번|선택지|보기)?\s*(?:[은는](?![가-힣])|[이가]?\s*아[니닌님닙닐]|일 (?:수(?!밖)|"
    r"리)|이?라면|이?라고 (?:가정|하면|착각|생각했|[볼할] 수(?:는|도)? 없|보기)"
    r"|\s*(?:또는|혹은|와|과|이?나|및|,|\b(?:or|and))\s*\Z"  # cut off before another option
    r"|이?라고 생각하기 쉽|(?:이?라고|으로|로)\s*(?:생각|오인|오해|혼동)[할될] 수(?:도|는)? 있(?:지만|으나)|[일인] 경우|[일인]지|일까|인가|같[지으기]|처럼|[로으]+ 보이[지나]|"
    r"일 가능성[은이도] (?:있|낮|적)"
    r"|\s(?:is|was) (?:not|wrong|incorrect|false)|\s(?:cannot|can't|isn't)|[^.\n\ue000-\ue400]{0,12}\?)",
    re.I,
)
_NOT_RIGHT = re.compile(
    r"(?:이|은|으로|에서|일|이라고|이라|인|으로는|라고)?\s*(?:아[니닌님닙닐]|될 수 없|수 없|수는 없|"
    r"제외|이?라면|인지|일까|처럼|같[지으기]|보이[지나]|보기 어렵|어렵"
    r"|생각(?:하기 쉽|했)|오해|착각|경우|수(?:도)? 있|하지 않|하면 안|지 않)|\s*(?:if|for another)\b|"
    r"[^.\n\ue000-\ue400]{0,8}\?"
)
_SHARED = re.compile(
    rf"[^.\n\ue000-\ue400]{{0,30}}?(?:또는|혹은|아니면|\bor)\s*(?:option\s*|선택지\s*|possibly\s*|maybe\s*)?{ANY}"
)
_SHARED_TEXT = re.compile(rf"\.?[^.\n\ue000-\ue400]{{0,40}}?(?:또는|혹은|아니면|\bor)\s*(?:option\s*|선택지\s*)?{ANY}")
_IF = re.compile(
    r"(?:만약|만일|\b(?:one|you|some|they|people|many)\s+(?:might|could|may|would)\s+(?:think|assume|argue|guess|suspect)\b|"
    r"\b(?:if|whether|suppose|unless|assuming)\b)[^.,\n]{0,40}\Z|\b(?:not|n't|wrong|"
    r"incorrect|other|why)\s+(?:the\s+)?[\w-]*\s*\Z",
    re.I,
)
_DENIED = re.compile(
    rf"({ANY}){_GLOSS}(?:은|는|이|가|도)?\s*(?:정답|답)(?:이|은|으로|에서|일|"
    r"이라고)?\s*(?:아[니닌님닙닐]|될 수 없|수 없|제외)"
    rf"|({ANY}){_GLOSS}\s+(?:is not|isn't|cannot be|can't be)\s+(?:the\s+)?(?:\w+\s+)?(?:answer|option|choice)"
    r"|(?:answer|정답[은이])\s*(?:is not|isn't|cannot be|"
    rf"can't be)?\s+(?:not\s+)?({ANY})\s*(?:[이가]\s*아[니닌님닙닐])",
    re.I,
)
_RIVAL = re.compile(
    rf"({ANY}){_GLOSS}(?:도|\s*역시|\s*또한)\s*[^.\n\ue000-\ue400]{{0,12}}?(?<![부불])(?:정답|답이|"
    rf"가능|맞|옳|적절)(?![^.\n]{{0,8}}(?:아[니닌님닙닐]|지 않|없|으나|지만))"
    rf"|({ANY}){_GLOSS}\s+(?:(?:could|might|may|can)\s+(?:also|equally|well)|is also|"
    r"is equally)\s+(?:be\s+)?(?:\w+\s+)?(?:correct|right|possible|acceptable|true|the answer)"
    r"|(?:^|[.,;]\s*)(?:or|maybe|perhaps|possibly)\s+(?:even\s+|possibly\s+|"
    rf"maybe\s+)?({OPTION})\s*(?:[?\n)]|\.\s|\.?\Z)",
    re.I,
)


def _verdicts(text: str) -> list[_Verdict]:
    """All verdicts in `text`, in order of where they end."""
    found: list[_Verdict] = []

    def add(match: re.Match[str], strength: int, unless: re.Pattern[str]) -> None:
        name = next(n for n in ("option", "named", "last", "first", "also", "plain") if match.groupdict().get(n))
        option, end = match[name], match.end(name)
        denied = re.search(
            r"\b(?:not|cannot|never|whether|if|depends|unclear|wrong|incorrect)\b|n't",
            match.groupdict().get("gap") or "",
            re.I,
        )
        aside = text[match.start() - 1 : match.start()] == "(" and re.fullmatch(
            r"정답\s*", text[match.start() : match.start(name)]
        )
        if denied or aside or unless.match(text, match.end()) or _IF.search(text, 0, match.start()):
            return
        shared = _SHARED.match(text, end) or _SHARED_TEXT.match(text, end)
        found.append(_Verdict(match.start(), end, None if shared else index_of(option), strength))

    for pattern, strength, unless in (
        (_CUED, _STRONG, _NOT_MEANT),
        (_CUED_TEXT, _STRONG, _NOT_MEANT),
        (_OPTION_FIRST, _STRONG, _NOT_RIGHT),
        (_OPTION_TEXT_FIRST, _STRONG, _NOT_RIGHT),
        (_CHOSEN, _STRONG, _NOT_MEANT),
        (_CORRECTED, _STRONG, _NOT_MEANT),
        (_CONCLUDED, _MIDDLE, _NOT_MEANT),
        (_STATED, _MIDDLE, _NOT_MEANT),
        (TICKED, _WEAK, _NOT_MEANT),
        (_IS_RIGHT, _WEAK, _NOT_RIGHT),
    ):
        for match in pattern.finditer(text):
            add(match, strength, unless)
    found += _standing_alone(text)
    return sorted(found, key=lambda verdict: verdict.end)


def _standing_alone(text: str) -> list[_Verdict]:
    """Options that are a line of their own, open the output, or label its last line."""
    found: list[_Verdict] = []
    for match in _BARE.finditer(text):
        whole, last = match.span() == (0, len(text)), match.end() == len(text)
        if (
            match[1] == SEVERAL
            or re.fullmatch(OPTION, match[1])
            or (whole and re.fullmatch("[\ue200-\ue219]", match[1]))
        ):
            found.append(_Verdict(match.start(1), match.end(1), index_of(match[1]), _STRONG if last else _MIDDLE))
    labelled = [index_of(m[1]) for m in _LABELLED.finditer(text)]
    opening = _OPENING.match(text) if not text.startswith("\ue008.") else None  # "I." numbers a heading
    if opening and not _NOT_MEANT.match(text, opening.end(1)):
        in_order = (
            len(labelled) > 1 and labelled[:2] == [labelled[0], (labelled[0] or 0) + 1] and not _OTHERS.search(text)
        )
        if not in_order:
            found.append(_Verdict(0, opening.end(1), index_of(opening[1]), _MIDDLE))
    head, _, tail = text.rpartition("\n")
    final = _LABELLED.match(tail)
    if final and len(labelled) == 1 and index_of(final[1]) != 0 and re.search(r"[.!다요음임]\s*\Z", head):
        start = len(head) + 1
        found.append(_Verdict(start, start + final.end(1), index_of(final[1]), _MIDDLE))
    return found


_OTHERS = re.compile(r"다른|나머지|오답|틀린|\b(?:other|others|incorrect|wrong)\b", re.I)

# ---- decide ---------------------------------------------------------------------------------------------------------

_TURN = re.compile(
    r"아니[,.…!다요야]|다시|정정|수정|따라서|그러므로|결론|결국|최종|하지만|그러나|그런데|다만|재검토|"
    r"재계산|잠깐|사실은?|오히려|[가-힣]지만|으나|므로\b"
    r"|\b(?:therefore|thus|hence|so|however|but|wait|actually|correction|corrected|reconsider\w*|"
    r"second thought|final|finally|instead|sorry|"
    r"mistake|no)\b",
    re.I,
)
_NEXT_QUESTION = re.compile(
    r"\n\s*#*\s*(?:다음\s*)?(?:질문|문제|문항|\bquestion|"
    r"\bQ)\s*(?:[\d\ue300-\ue309]*\s*(?:\([^()\n]*\))?\s*[:.)]|[\d\ue300-\ue309]+\s*\n)",
    re.I,
)
_QUESTION_NUMBER = re.compile(
    r"(?:질문|문제|문항|question|Q)\s*(\d+)\S{0,2}\s*(?:의)?\s*(?:정답|답|answer)|(\d+)번 (?:문제|"
    r"문항|질문)의? ?(?:정답|답)",
    re.I,
)


# An answer field, as in our own templates; one that closes the output outweighs whatever the prose before it says.
_FIELD = re.compile(
    rf"^[ \t]*(?:최종\s*)?(?:final\s+)?(?:정답|답|answer)[ \t]*(?::\s*|\n\s*)\(?({ANY})(?=[.)]?\s*$)", re.I | re.M
)
_FIELD_AT_END = re.compile(_FIELD.pattern.replace(r"\s*$", r"\s*\Z"), re.I | re.M)


def _decide(text: str) -> int | None:
    fields = [index_of(option) for option in _FIELD.findall(text)]
    if (closing := _FIELD_AT_END.search(text)) and len(set(fields)) == 1:
        return index_of(closing[1])
    verdicts = _verdicts(text)
    if not verdicts:
        return None
    strongest = max(verdict.strength for verdict in verdicts)
    last = [verdict for verdict in verdicts if verdict.strength == strongest][-1]
    for earlier in verdicts[: verdicts.index(last)]:
        # A weaker verdict counts against the last one only where nothing but space lies between, as in "A", "B".
        rival = earlier.strength == strongest or not re.search(r"\w", text[earlier.end : last.start])
        if earlier.option != last.option and rival and not _TURN.search(text, earlier.end, last.end):
            return None
    for match in _DENIED.finditer(text, last.end):
        if index_of(match[match.lastindex or 1]) == last.option:
            return None
    for match in _RIVAL.finditer(text, last.end):
        if index_of(match[match.lastindex or 1]) != last.option:
            return None
    return last.option


def parse(output: str, letters: str = LETTERS[:5]) -> str | None:
    """The one of `letters` that `output` gives as its answer; None when it gives none, several, or does not say.

    Never a guess: refusals, outputs that were cut off, echoes of the options and bare values ("50", "2년") are None.
    Option numbers count from 1 ("3번" is C). `letters` are the question's options in order.
    """
    text = normalise(output)
    if len({number for pair in _QUESTION_NUMBER.findall(text) for number in pair if number}) > 1:
        return None  # answers several questions, of which one at most was asked
    for question in _NEXT_QUESTION.finditer(text):
        if _verdicts(text[: question.start()]):  # what follows a verdict is a question of the model's own
            text = text[: question.start()].strip()
            break
    option = _decide(text)
    return letters[option] if option is not None and option < len(letters) else None


extract_answer_letter = parse
"""The name under which the replaced scripts had it."""


# ---- how well the completion format was kept ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FormatScore:
    """What a reasoning answer kept of its format: `score` is (fields kept + answer kept) / (fields required + 1)."""

    score: float
    kept: tuple[str, ...]  # required fields with text behind them, in the required order
    missing: tuple[str, ...]  # required fields that are absent, empty or out of order
    answered: bool  # one `answer:`, behind every field, followed by one letter and nothing else


def score_format(output: str, fields: Sequence[str], letters: str = LETTERS[:5]) -> FormatScore:
    """How much of the format of `prompts` an answer keeps: each of `fields` (of records.FIELDS), then one final letter.

    `score` is in [0, 1]. It says nothing about the answer being right; `score_total` adds that.
    """
    text = one_turn(output)
    _, *parts = re.split(rf"^[ \t]*({'|'.join((*fields, 'answer'))})[ \t]*:", text, flags=re.M)
    sections = [*zip(parts[::2], parts[1::2], strict=True)]
    place = {name: i for i, name in enumerate(fields)}
    kept: list[str] = []
    for name, body in sections:
        if name in place and body.strip() and all(place[earlier] < place[name] for earlier in kept):
            kept.append(name)
    answers = [body.strip() for name, body in sections if name == "answer"]
    answered = len(answers) == 1 and sections[-1][0] == "answer" and answers[0] in tuple(letters)
    missing = tuple(name for name in fields if name not in kept)
    return FormatScore((len(kept) + answered) / (len(fields) + 1), tuple(kept), missing, answered)


def score_total(format_score: float, correct: bool) -> float:
    """One third format, two thirds correctness: the total of the scripts that medlora replaces (medgemma_korean)."""
    return format_score / 3 + 2 * correct / 3
