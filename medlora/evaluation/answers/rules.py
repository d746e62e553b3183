"""The ways in which a text names the answer, as a table of patterns on `text.normalise`'s characters.

Each rule has one text beside it that it must read and one that it must not; `tests/test_answers.py` tries both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from medlora.evaluation.answers.text import ANY, MARKED, OPTION, PLAIN, TICKED

STRONG, MIDDLE, WEAK = 3, 2, 1


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
    r"경우))|정정|수정|변경|하겠|정하|정합|한다(?=\.)|바꾸|바꾼|바꿉|바꿔|보는 것이 (?:타당|옳|맞|적절)|고르|고릅|골랐|고른|골라|택하|택합|결정|답하|답합|판단)"
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
    r"\b(?:choos(?:e|ing)|chose|pick(?:ing)?|select(?:ing)?|go(?:ing)? (?:with|for)|(?:would|will|'d|can) guess|chang(?:e|ing)(?: my (?:answer|choice))?(?: from \S+)? to|went with|opt for|"
    rf"settle on)\s+{_FILL}"
    rf"(?P<option>{ANY})|(?:추측하자면|찍자면|찍는다면|고르면|선택하면|고르자면|고른다면|고르라면|선택하자면|선택한다면|"
    rf"골라야 한다면),?\s*{_FILL}(?P<named>{ANY})",
    re.I,
)


_END = (
    rf"(?={_GLOSS}\s*(?:[.,!;:\n]|\Z|입니다|이다|다(?![가-힣])|임(?![가-힣])|예요|이에요|이야|"
    r"[이가] 맞|뿐(?:이|입)|라고|로 (?:보|판단)))"
)


_CORRECTED = re.compile(
    r"(?:(?:^|[,.!?…\n]\s*)아니(?:다|요|야)?[,.…!]+|정정(?:하면|합니다|하겠습니다)?|다시 (?:보면|보니|"
    r"생각[가-힣]*|계산[가-힣]*)|\b(?:actually|wait|no|sorry|on second thought|scratch that)\b|"
    rf"\bcorrection)[\s,:.…]*[^.\n\ue000-\ue400]{{0,20}}?(?P<option>{OPTION}){_END}",
    re.I,
)


_CONCLUDED = re.compile(
    r"(?:따라서|그러므로|그래서|결국|결론적으로|고로|즉|므로|지만|으나|\bbut|\b(?:therefore|thus|hence|"
    r"so))[,:\s]+(?:(?:it|that)(?:'s| is| must be| would be)\s+)?"
    rf"{_FILL}(?P<option>{OPTION}){_END}",
    re.I,
)


# "제 생각에는 D입니다", "it's D": a sentence of nothing but an option.
_STATED = re.compile(
    r"(?:^|[.!?,:\n]\s*|생각(?:에|으로)[는은]?\s*|저는\s*|이는\s*|실제로는\s*|아마도?\s*|따라서,?\s*|(?:지만|으나),?\s*"
    rf")(?:선택지\s*|보기\s*|바로\s*)?(?P<option>{OPTION}){_GLOSS}\s*"
    r"(?:입니다|이다|다(?=\.)|예요|이에요|일 것(?:입니다|이다| 같)|인 것 같습|이?라고 (?:생각합|생각한|판단|봅)|"
    r"같습니다|에 해당(?:합|한|됩|된)|[와과] 일치)"
    r"|\b(?:it's|it is|that (?:would be|is)|I(?:'d| would) say|I (?:believe|think)|definitely|probably|clearly|likely|surely|certainly|which is|"
    r"most likely|answer's|(?:if I had )?to (?:choose|guess|pick),|lean(?:ing)? towards?|(?:it|this|that|answer) (?:must|has to|should|would|will) be|(?:I(?:'ll| will| would|'d) say)|I mean[t]?)"
    rf"\s+{_FILL}(?P<named>{OPTION}){_END}|\b(?:corresponds to|matches|consistent with) (?:the )?(?:option|"
    rf"choice) (?P<last>{OPTION}){_END}",
    re.I,
)


# What names the right option without "answer"; a review of every option does so too, so these are weak.
_NOUN = (
    r"것|설명|진단명?|질환|병명|처치|치료제?|치료법|검사|약물|약제|약|원인균?|병원체|균주?|조치|중재|간호|방법|소견|시술|수술|부위|기전|합병증|"
    r"선택지|보기|옵션"
)


# "② 수액 투여이다.": the option's text behind it, to the end of a sentence that names no other option.
_TEXT_END = r"\s+[^.,\n\ue000-\ue400]{1,30}?(?:이다|입니다|임|이에요|예요|[가-힣]다|(?<=[이가]) [^.,\n\ue000-\ue400]{1,8}하다)(?:\.|\s*\n|\s*\Z)"


_IS_RIGHT = re.compile(
    rf"(?:(?<!답이 아닌 )(?:{_NOUN}|"
    rf"가장 [^.,\n\ue000-\ue400]{{1,30}}?)(?:으?로)?[은는]\s*{_FILL}(?P<option>{ANY})(?:{_END}|(?={_TEXT_END}))"
    rf"|(?P<named>{OPTION}){_GLOSS}\s*(?:(?:선택지|보기|옵션)\s*)?(?:이|가|만|만이)\s*[^.,\n\ue000-\ue400]{{0,20}}?"
    r"(?<![부불])(?:맞|옳|적절|적합|타당|해당|부합|만족|충족|알맞|바람직|유력|올바|정확|최선|우선)(?![^.\n]{0,8}(?:지 않|지 못|수 없|지만|어렵))"
    rf"|\b(?:most|best)\s[^.,:;\n\ue000-\ue400]{{1,60}}\b(?:is|be)(?:: ?|"
    rf" )(?:(?:[^.;\n\ue000-\ue400]{{0,60}} )?(?P<last>{MARKED})"
    rf"|(?:[^.;\n\ue000-\ue400]{{0,60}} )?option (?P<also>{OPTION}){_END}|(?P<plain>{PLAIN}){_END})"
    rf"|(?P<first>{OPTION}){_GLOSS}\s+(?:is|seems|looks|appears)\s+(?:to be )?(?:clearly |therefore |thus |"
    r"the |most |best )*(?:correct|right|true|"
    r"appropriate|accurate|best)\b(?!\s+for the))",
    re.I,
)


_REMAINING = re.compile(
    rf"(?:남는|남은|남아 있는)\s*(?:것|하나|선택지|보기|답|후보)[은는]?\s*{_FILL}(?P<option>{ANY})(?:뿐|만)?{_END}"
    rf"|(?P<named>{OPTION})(?:번|항)?(?:만|이|가|만이)\s*남(?:는다|습니다|게 된|았다|음)"
    r"|\b(?:(?:that|this) leaves|which leaves|leaves us with|(?:are|am|is) left with|leaves only|"
    r"(?:we|I) get|(?:what|the one that) remains is|the only (?:option|choice|answer|one) (?:that|which) \w+ is|remaining (?:option|choice|answer|one|possibility) (?:is|must be)|by (?:process of )?elimination,?)\s+(?:us with\s+)?(?:only\s+)?"
    rf"(?:it(?:'s| is| must be)\s+)?{_FILL}(?P<last>{OPTION}){_END}"
    rf"|\bonly\s+{_FILL}(?P<also>{OPTION})\s+(?:is left|remains|fits|satisfies|meets|explains|is possible|matches|is correct|is right)",
    re.I,
)


_IS_THE_ONE = re.compile(
    rf"(?P<option>{OPTION})\s+(?:it is\b|is(?=\.?\s*\Z)|is the (?:one|winner|only (?:option|choice|answer|one))\b|(?:best|most closely) (?:describes|explains|fits|matches|answers)\b"
    r"|is (?:more|most|the most|better|best)\s*(?:likely|supported|suitable|appropriate|probable|consistent)?(?=[.,;\n]|\Z))",
    re.I,
)


_RATED = re.compile(
    rf"(?P<option>{OPTION})(?:번|항)?\s*[이가]\s*(?:가장|제일)\s*(?:좋|낫|나은|가깝|가까|그럴듯|확실|타당)"
    rf"|(?P<plain>{OPTION})(?:(?:인|일) 것 같(?:다|습니다|아요)|일 가능성이 (?:가장 )?(?:높|크|큽)|\s+정답(?=\s*(?:[,.;/\n]|\Z)))"
    rf"|(?P<last>{MARKED})\s+[^.,\n\ue000-\ue400]{{1,20}}[이가]\s*(?:가장|제일|우선)\s*(?:좋|낫|적절|적합|타당|바람직|우선)"
    rf"|(?P<named>{MARKED})[을를]\s*(?:먼저\s*|우선\s*)?(?:시행|투여|선택|실시|적용)(?:해야|하여야)"
    rf"|(?P<also>{OPTION})\s*(?:\?\s*(?:맞다|맞습니다|그렇다|yes\b|right\b|correct\b)|[\-:]\s*(?:맞음|옳음|정답|correct|right)(?![가-힣A-Za-z]))"
    r"|\b(?:(?:incorrect|false|wrong|untrue) statement|statement|exception|diagnosis|treatment|therapy|cause|organism|drug|step|test|finding|management)"
    rf"(?:\s(?:that|which) is (?:not |in|un)\w+)? (?:is|would be|must be|should be) {_FILL}(?P<first>{OPTION}){_END}",
    re.I,
)


_FIELD_LINE = re.compile(
    rf"^\s*(?:correct|final|result|response|selected|selection|output|prediction|predicted)\s*[:→]\s*(?P<option>{ANY})(?=[.)]?\s*$)",
    re.I | re.M,
)


# "수액을 투여한다 (선택지 D)." at the end of all, and "Chest X-ray (A)" where no other option is named.
_IN_CLOSING = re.compile(
    rf"(?:\(\s*(?:정답|답|선택지|보기|option|choice|answer)\s*[:은]?\s*(?P<option>{ANY})\s*\)|[다요음임함]\s*\.?\s*(?P<last>{MARKED})"
    rf"|(?:\b(?:i\.e\.|that is|namely),?|-|\()\s*(?:option|choice)\s+(?P<also>{OPTION})\)?)\s*\.?\s*\Z"
    rf"|(?<=[가-힣a-z.] )→\s*(?P<named>{OPTION})\s*\.?\s*\Z"
    rf"|\A[^\n\ue000-\ue400]{{3,200}}[가-힣a-z]\s*(?P<first>{MARKED})(?:[을를]\s*[^.\n\ue000-\ue400]{{1,15}}다)?\s*\.?\s*\Z",
    re.I,
)


_CONCLUDED_TEXT = re.compile(
    rf"(?:따라서|그러므로|그래서|결국|결론적으로|\b(?:therefore|thus|hence|so))[,:\s]+(?:(?P<option>{MARKED})\s+[^.,\n\ue000-\ue400]{{1,30}}(?=\.?\s*\Z)"
    rf"|[^.,\n\ue000-\ue400]{{1,40}}\s?(?P<last>{MARKED})(?=\s*(?:\.?\s*\Z|[이가를을]\s)))",
    re.I,
)


BARE = re.compile(
    r"^\s*(?:(?:(?:질문|문제|문항|question|Q)\s*)?[\d\ue300-\ue309]{1,3}[.):]\s*|(?:option|choice|"
    r"선택지|보기)\s+|(?:=>|[→⇒∴])\s*|\ue000:\s*)?"
    rf"({ANY})[.)\]:,;]*\s*(?:입니다|이다|다|임|예요|이에요)?[.!]*\s*$",
    re.M | re.I,
)


OPENING = re.compile(
    rf"(?:(?:option|choice|선택지|보기)\s+)?({OPTION})(?:\s*[.):;,](?!\s*{ANY})|\s+[-–—:]\s|\s*\(|"
    r"\s*(?:입니다|이다|예요|이에요|임|다)(?![가-힣])|\s+(?:because|since)\b"
    rf"|(?<={MARKED})\s+\S|\s+[가-힣][^\n.?\ue000-\ue400]{{0,40}}(?<![다요])\Z)",
    re.I,
)


LABELLED = re.compile(rf"^\s*(?:(?:option|선택지|보기)\s*)?({OPTION})\s*[.):]\s*\S", re.M | re.I)


# Behind an option: what takes the verdict back, makes it a condition or a question, or shares it with another option.
NOT_MEANT = re.compile(
    rf"{_GLOSS}\s*(?:번|선택지|보기)?\s*(?:[은는](?![가-힣])|[이가]?\s*아[니닌님닙닐]|일 (?:수(?! ?밖)|"
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


SHARED = re.compile(
    rf"[^.\n\ue000-\ue400]{{0,30}}?(?:또는|혹은|아니면|\bor)\s*(?:option\s*|선택지\s*|possibly\s*|maybe\s*)?{ANY}"
)


SHARED_TEXT = re.compile(rf"\.?[^.\n\ue000-\ue400]{{0,40}}?(?:또는|혹은|아니면|\bor)\s*(?:option\s*|선택지\s*)?{ANY}")


IF = re.compile(
    r"(?:만약|만일|\b(?:one|you|some|they|people|many)\s+(?:might|could|may|would)\s+(?:think|assume|argue|guess|suspect)\b|"
    r"\b(?:if|whether|suppose|unless|assuming)\b)[^.,\n]{0,40}\Z|\b(?:not|n't|wrong|"
    r"incorrect|other|why)\s+(?:the\s+)?[\w-]*\s*\Z",
    re.I,
)


DENIED_LATER = re.compile(
    rf"({ANY}){_GLOSS}(?:은|는|이|가|도)?\s*(?:정답|답)(?:이|은|으로|에서|일|"
    r"이라고)?\s*(?:아[니닌님닙닐]|될 수 없|수 없|제외)"
    rf"|({ANY}){_GLOSS}\s+(?:is not|isn't|cannot be|can't be)\s+(?:the\s+)?(?:\w+\s+)?(?:answer|option|choice)"
    r"|(?:answer|정답[은이])\s*(?:is not|isn't|cannot be|"
    rf"can't be)?\s+(?:not\s+)?({ANY})\s*(?:[이가]\s*아[니닌님닙닐])",
    re.I,
)


RIVAL = re.compile(
    rf"({ANY}){_GLOSS}(?:도|\s*역시|\s*또한)\s*[^.\n\ue000-\ue400]{{0,12}}?(?<![부불])(?:정답|답이|"
    rf"가능|맞|옳|적절)(?![^.\n]{{0,8}}(?:아[니닌님닙닐]|지 않|없|으나|지만))"
    rf"|({ANY}){_GLOSS}\s+(?:(?:could|might|may|can)\s+(?:also|equally|well)|is also|"
    r"is equally)\s+(?:be\s+)?(?:\w+\s+)?(?:correct|right|possible|acceptable|true|the answer)"
    r"|(?:^|[.,;]\s*)(?:or|maybe|perhaps|possibly)\s+(?:even\s+|possibly\s+|"
    rf"maybe\s+)?({OPTION})\s*(?:[?\n)]|\.\s|\.?\Z)",
    re.I,
)


# Behind a verdict: it is taken back, and nothing replaces it.
RETRACTED = re.compile(
    r"(?:\A|[.!?\n])\s*아니(?:[,.…!]|요[,.!])|\b(?:wait|no|actually)\b[^.\n]{0,40}?\b(?:is|was|'s)\s+(?:wrong|incorrect|not right|a mistake)"
    r"|\bthat (?:is|was) (?:wrong|a mistake)",
    re.I,
)


EXAMPLES = {
    "BARE": ("폐렴이다.\nB", "B 폐렴"),
    "OPENING": ("B. 폐렴", "B형 간염"),
    "LABELLED": ("B. 폐렴", "B 폐렴"),
    "NOT_MEANT": ("B일까", "B입니다."),
    "_NOT_RIGHT": ("B인지 모른다.", "B입니다."),
    "SHARED": ("B 또는 C", "B 또는 폐렴"),
    "SHARED_TEXT": ("B. 폐렴 또는 C", "B. 폐렴 또는 천식"),
    "IF": ("만약 정답이 ", "만약 그렇다면, 정답이 "),
    "DENIED_LATER": ("B가 정답이 아니다.", "B가 정답이다."),
    "RIVAL": ("C도 정답이다.", "C도 정답은 아니다."),
    "RETRACTED": ("Wait, that is wrong.", "What is wrong?"),
}
"""Beside the rules: a text that each pattern must read, and one that it must not; tests/test_patterns.py tries both."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern that finds an option, and its weight; no verdict where `unless` follows the option."""

    name: str
    pattern: re.Pattern[str]
    strength: int
    unless: re.Pattern[str]
    reads: str
    leaves: str


RULES = (
    Rule("cue, option", _CUED, STRONG, NOT_MEANT, "정답은 B입니다.", "오답은 B입니다."),
    Rule(
        "cue, text, option",
        _CUED_TEXT,
        STRONG,
        NOT_MEANT,
        "정답은 폐렴(B)입니다.",
        "정답은 폐렴이며 B형 간염이 동반된다.",
    ),
    Rule("option, cue", _OPTION_FIRST, STRONG, _NOT_RIGHT, "B가 정답이다.", "B가 정답인지 모른다."),
    Rule("option, text, cue", _OPTION_TEXT_FIRST, STRONG, _NOT_RIGHT, "B. 폐렴이 정답이다.", "B. 폐렴이 흔하다."),
    Rule("chosen", _CHOSEN, STRONG, NOT_MEANT, "I would choose B.", "I would not choose B."),
    Rule("corrected", _CORRECTED, STRONG, NOT_MEANT, "Wait, it is B.", "Wait, B or C?"),
    Rule("concluded", _CONCLUDED, MIDDLE, NOT_MEANT, "따라서 B.", "따라서 B는 아니다."),
    Rule(
        "concluded with its text",
        _CONCLUDED_TEXT,
        MIDDLE,
        NOT_MEANT,
        "따라서 ② 수액 투여.",
        "따라서 ② 수액과 ③ 항생제.",
    ),
    Rule("remaining", _REMAINING, MIDDLE, NOT_MEANT, "남은 것은 B이다.", "남은 것은 B와 C이다."),
    Rule("stated", _STATED, MIDDLE, NOT_MEANT, "제 생각에는 B입니다.", "혈액형은 B입니다."),
    Rule("is the one", _IS_THE_ONE, WEAK, _NOT_RIGHT, "B best explains the findings.", "B explains some findings."),
    Rule("rated", _RATED, WEAK, _NOT_RIGHT, "B가 제일 낫다.", "B가 더 흔하다."),
    Rule("field line", _FIELD_LINE, STRONG, NOT_MEANT, "Result: B", "Result: B and C"),
    Rule("in closing", _IN_CLOSING, WEAK, NOT_MEANT, "수액을 투여한다(선택지 B).", "(선택지 B)는 흔한 오답이다."),
    Rule("ticked", TICKED, WEAK, NOT_MEANT, "A. 폐렴\nB. 천식 ✓", "A. 폐렴\nB. 천식"),
    Rule("is right", _IS_RIGHT, WEAK, _NOT_RIGHT, "B가 가장 적절하다.", "B가 가장 흔하다."),
)
