"""What a model wrote -> the option letter it meant, or None; and how well it kept the completion format.

`parse` reads in three steps, as a careful reader does:

1. *Normalise*: keep the final turn, fold look-alike characters, drop markup, and replace everything that can be an option
   (`B`, `(b)`, `②`, `2번`, `**B**`) by one private-use character, so that the rules below see options and words, not
   spellings. Letters that belong to a name (`비타민 D`, `B형 간염`, `E. coli`, `τ = F/A`) never become options; a list of
   options (`A와 C`) becomes one character that stands for no letter; an echo of the option list goes.
2. *Collect* verdicts: who says "the answer is", where, and how strongly. A verdict that is denied, conditional, asked or
   shared between two options is none.
3. *Decide*: the strongest kind of verdict speaks; among unequal verdicts of that kind the last one does if the model turned
   or concluded in between, and nobody otherwise.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from medlora.records import LETTERS

# ---- 1. normalise ---------------------------------------------------------------------------------------------------

# Private-use blocks: option written plainly (B), marked as an option ((B), ②, 2번), in lower case (b), as a digit (2).
_PLAIN, _MARKED, _SMALL, _DIGIT, _SEVERAL = 0xE000, 0xE100, 0xE200, 0xE300, "\ue400"
_P, _M = "[\ue000-\ue019]", "[\ue100-\ue119]"
_L = "[\ue000-\ue119]"  # written plainly or marked: an option wherever it stands
_ANY = "[\ue000-\ue319\ue400]"  # also lower case, a digit, or several at once: an option where a verdict is expected

_LOOKALIKES = str.maketrans("АВСЕНІЈКМОРЅТХасеΑΒΕΖΗΙΚΜΝΟΡΤΧ", "ABCEHIJKMOPSTXaceABEZHIKMNOPTX")
_ENCLOSED = {ord(c): f"({i}번)" for row in ("①②③④⑤⑥⑦⑧⑨⑩", "❶❷❸❹❺❻❼❽❾❿", "➀➁➂➃➄➅➆➇➈➉") for i, c in enumerate(row, 1)}
_ENCLOSED |= {first + i: f"({chr(65 + i)})" for first in (0x24B6, 0x24D0, 0x1F150, 0x1F170, 0x1F130) for i in range(26)}

# Letters inside a name are no options: "비타민 D", "hepatitis B", "E. coli", "C 언어".
_NAMES = re.compile(
    r"((?:비타민|간염|인플루엔자|면역글로불린|코엔자임|암포테리신|지단백|인자|그룹|타입|유형|등급|환자|약물|물질|용액|지점|집단|"
    r"\b(?:vitamin|hepatitis|influenza|group|type|factor|protein|immunoglobulin|coenzyme|amphotericin|cyclosporine?|grade|"
    r"stage|phase|class|serotype|serogroup|toxin|patient|drug|substance|subtype|apolipoprotein|Child[- ]Pugh))[ \-]?)"
    r"\(?[A-J]\)?(?![A-Za-z])"
    r"|\b[A-J](?=\s(?:cells?|lymphocytes?|peptide|dimer|symptoms|fib|section)\b|\s(?:세포|림프구|언어|형(?=[\s은는이가])|"
    r"다이머|펩타이드|반응성))"
    r"|\b[A-E]\. ?(?=coli|difficile|diff\b|perfringens|botulinum|tetani|albicans|trachomatis|jejuni|neoformans|diphtheriae|"
    r"cereus|anthracis|fragilis|pertussis|henselae|baumannii|fumigatus|faecalis|faecium|histolytica|cloacae|granulosus)",
    re.I,
)

# What may follow a letter directly in Korean without making it part of a word (B입니다, B가; not B형, B세포).
_ENDING = (
    r"(?:번|항(?![가-힣])|안(?![가-힣])|입니|이[다며고므라지었에야나]|이(?=[\s,.])|다(?![가-힣])|임|인(?!자)|일|였|예|에[요서]|[가은는을를로와과"
    r"나도만의에야죠지뿐라](?![가-힣]{3})|로서|라고|라는|라면|라서|이라|보다|만이|까지|처럼|또는|혹은|및|중)"
)
_EDGE_LEFT = r"(?<![A-Za-z0-9_=+^\\/&'])(?<![A-Za-z0-9]-)"
_EDGE_RIGHT = r"(?![A-Za-z0-9_^+/%℃°]|'[a-z]|-[A-Za-z0-9]|\s*[=≈×÷^∝≤≥]|[가-힣])"
_PLAIN_LETTER = re.compile(rf"{_EDGE_LEFT}([A-Z])(?:(?={_ENDING})(?:번|항(?![가-힣])|안(?![가-힣]))?|{_EDGE_RIGHT})")
_SMALL_LETTER = re.compile(rf"{_EDGE_LEFT}([a-j])(?:(?={_ENDING})|(?! [A-Za-z]|\.[A-Za-z]){_EDGE_RIGHT})")
_MARKED_LETTER = re.compile(r"(?<![A-Za-z0-9_])[(\[{<]\s?([A-Za-z])\s?[)\]}>](?![A-Za-z0-9_'^]|\s*=)(?:번|항(?![가-힣]))?")
_NUMBERED = re.compile(
    r"(?<![\d.])[(\[]?(10|[1-9])\s?번(?!째|[ 의]*(?:문제|문항|질문|문(?!\w)|이상|이하|씩|정도|반복|복용|투여|더 )|호|지\b)[)\]]?번?"
)
_BARE_DIGIT = re.compile(
    r"(?<![\d.,\-/=≈~])[(\[]?(10|[1-9])[)\]]?(?=\s*(?:입니다|이다|이며|임|예요|이에요|이 정답|가 정답|\Z|\n)|(?<![\n\d].)(?<!\A.)[.)](?:\s|\Z))"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_AND = r"(?:,\s*(?:and|or|및|또는|혹은|그리고)?|&|·|~|와|과|이?나|및|또는|혹은|아니면|이?거나|이?랑|하고|그리고|and/or|and|or|vs\.?)"
_LIST = re.compile(
    rf"{_ANY}(?:\s*\([^()\n]{{0,40}}\))?(?:\s*{_AND}\s*(?:(?:option|choice|선택지|보기)\s*)?{_ANY}(?:\s*\([^()\n]{{0,40}}\))?"
    r"(?!\s*(?:[은는](?![가-힣])|이? 아니|가 아니|is\b|are (?:not|in|wr)|was\b|because\b|인 \S+ 틀)))+"
)
# "A가 아니라", "not A but", "A보다는", "rather than A": the option that is set aside.
_SET_ASIDE = re.compile(
    rf"{_ANY}(?:\s*\([^()\n]{{0,40}}\))?(?:이|가|은|는)?\s*아니(?:라(?![고면서])|고|며)[,\s]*|{_ANY}보다는?\s*|(?:{_ANY}(?:이|가|도)?\s*)+아닌\s+(?={_ANY})"
    rf"|{_ANY}[\s,.…\-]*(?:아니[요다]?|\b(?:no|wait|sorry|actually|I mean)\b)[\s,]*(?:(?:no|wait|sorry|actually)\b[\s,]*)*(?={_ANY})"
    rf"|,?\s*\bnot\s+(?:option\s+)?{_ANY}\s*(?:\([^()\n]{{0,40}}\)\s*)?,?\s*\bbut\b"
    rf"|,?\s*\b(?:rather than|instead of|and not|over)\s+(?:option\s+)?{_ANY}|,\s*not\s+(?:option\s+)?{_ANY}"
    rf"|\b(?:between|among|of|from|out of)\s+{_SEVERAL}\s*,?|{_SEVERAL}\s*(?:중(?:에서|에)?|가운데)(?:는|도)?\s*",
    re.I,
)


def _one_turn(text: str) -> str:
    """The model's own final turn: no private-use characters, nothing behind an end-of-turn token, no thinking."""
    text = re.sub("[\ue000-\uf8ff\u200b-\u200f\u2060\ufeff]", "", text)
    text = re.sub(r"\A(?:\s|<bos>|<s>|<start_of_turn>(?:model)?|<\|im_start\|>(?:assistant)?)+", "", text)
    text = re.split(r"<(?:eos|end_of_turn|start_of_turn|/s)>|<\|[a-z_]+\|>", text, maxsplit=1)[0]
    text = re.sub(r"<(think|thinking|reasoning)>.*?(?:</\1>|<\1/>)", "\n", text, flags=re.S | re.I)
    if re.search(r"<(?:think|thinking)>", text, re.I):  # cut off while still thinking
        return ""
    return re.split(r"</(?:think|thinking|reasoning)>|<R/>", text, flags=re.I)[-1]


def _plain_text(text: str) -> str:
    """Text with look-alikes folded and markdown, LaTeX and quotes gone; line breaks stay."""
    text = text.translate(_ENCLOSED)
    text = unicodedata.normalize("NFKC", text.translate(_LOOKALIKES)).translate(_LOOKALIKES)
    text = re.sub(r"[’‘`´]", "'", text)
    for _ in range(2):
        text = re.sub(r"\\(?:text|textbf|mathbf|mathrm|textrm|bf)\s*\{([^{}]*)\}", r"\1", text)
    text = _BOXED.sub(r"\nanswer: \1\n", text)
    text = re.sub(r"</?(?:answer|정답|final_answer|final)>", "\nanswer:\n", text, flags=re.I).removesuffix("\nanswer:\n")
    text = re.sub(r"<br\s*/?>", "\n", text)
    text = re.sub(r"[*_]{2}\s*[(\[\"']*([A-Za-z])[)\]\"']*\s*[*_]{2}(?![A-Za-z])", r"(\1)", text)
    text = re.sub(r"\*|__|[\"“”「」『』«»$]|\\[()\[\]]|^[ \t]*(?:#+|>+|[-•▶■●◆]+)(?=\s|[가-힣A-Z(])", "", text, flags=re.M)
    text = re.sub(r"(?<![A-Za-z])'|'(?![A-Za-z])|~~[^~\n]*~~", "", text)  # apostrophes stay
    text = re.sub(r"(답|answer|choice)\s*=\s*", r"\1: ", text, flags=re.I)
    text = re.sub(r"[\[【<]\s*((?:최종\s*)?(?:정답|답안?|answer|final answer))\s*[\]】>]", r"\1:", text, flags=re.I)
    return re.sub(r"\[\[([A-Za-z])\]\]", r"[\1]", text)


def _options(text: str) -> str:
    """Text with every option spelling replaced by its private-use character."""

    def mark(block: int) -> object:
        return lambda found: chr(block + ord(found[1].upper()) - 65)

    def number(block: int) -> object:
        return lambda found: chr(block + int(found[1]) - 1)

    text = _NAMES.sub(lambda found: f"{found[1] or ''}_", text)
    text = _NUMBERED.sub(number(_MARKED), text)
    text = _MARKED_LETTER.sub(mark(_MARKED), text)
    text = _PLAIN_LETTER.sub(mark(_PLAIN), text)
    text = _SMALL_LETTER.sub(mark(_SMALL), text)
    # A digit that the reasoning computed ("= 3") is a value, not the third option.
    computed = set(re.findall(r"[=≈]\s*(\d+)(?![\d.])", text))
    text = _BARE_DIGIT.sub(lambda found: found[0] if found[1] in computed else number(_DIGIT)(found), text)
    # "C(3번)": the same option said twice.
    return re.sub(rf"({_ANY})\s?({_M})", lambda f: f[2] if _index(f[1]) == _index(f[2]) else _SEVERAL, text)


def _index(option: str) -> int | None:
    """Place of an option character in the alphabet; None for several options at once."""
    return None if option == _SEVERAL else ord(option) & 0xFF


_TICKED = re.compile(rf"^[ ]*(?P<option>{_L})\s*[.):\-](?:[^\n]*[✓✔✅⭕]|\s*\(?(?:정답|맞음|옳음|correct)(?! ?(?:이? ?아|answer)))", re.I | re.M)


def _without_echo(text: str) -> str:
    """Text without lists of options: lines or parts of a line that begin with A, B, C, ... in order."""
    lines = text.split("\n")
    head = re.compile(rf"\s*(?:(?:option|선택지|보기)\s*)?({_L})\s*[.):,]")
    run: list[int] = []
    for number, line in [*enumerate(lines), (len(lines), "end")]:
        found = head.match(line)
        inline = [_index(o) for o in re.findall(rf"{_L}(?=\s*[.):])", line)]
        marked = [_index(o) for o in re.findall(_M, line)]
        listed = next((o for o in (inline, marked) if len(o) > (o is marked) + 1 and o == [*range(len(o))]), None)
        if listed and re.match(rf"\s*(?:(?:보기|선택지|options?|choices)\W+)?{_L}", line, re.I):
            lines[number] = ""
        elif found and _index(found[1]) == len(run):
            run.append(number)
        elif line.strip():
            if len(run) > 1:
                ticked = [echoed for echoed in run if _TICKED.match(lines[echoed])]
                for echoed in run:
                    if ticked != [echoed]:
                        lines[echoed] = ""
            run = [number] if found and _index(found[1]) == 0 else []
    return "\n".join(lines)


def _several(found: re.Match[str]) -> str:
    options = {_index(option) for option in re.findall(_ANY, found[0])}
    return chr(_MARKED + min(o for o in options if o is not None)) if len(options) == 1 and None not in options else _SEVERAL


def _normalise(output: str) -> str:
    text = _options(_plain_text(_one_turn(output)))
    text = _without_echo(text)
    text = re.sub(rf"^\s*{_M}\s*[:\-–.]\s*(?={_ANY})", "", text, flags=re.M)  # "1번: B": the number of the question
    text = _LIST.sub(_several, text)
    return _SET_ASIDE.sub("", text).strip()


# ---- 2. collect -----------------------------------------------------------------------------------------------------

_STRONG, _MIDDLE, _WEAK = 3, 2, 1


@dataclass(frozen=True, slots=True)
class _Verdict:
    start: int
    end: int
    option: int | None  # None: a verdict that names several options
    strength: int


_GLOSS = r"(?:\s*\([^()\n]{0,60}\))?"
_FILL = (
    r"(?:(?:therefore|thus|probably|most likely|likely|clearly|definitely|indeed|still|simply|in fact|actually|option|choice|letter|"
    r"number|answer|the|as follows|선택지|보기|옵션|번호|아마도?|바로|역시|결국|당연히|확실히|명백히|다음과 같습니다|다음과 같다|"
    r"최종적으로)[\s:.,]*)*[(\[{<]?"
)
_KOREAN_CUE = (
    r"(?<!틀린 )(?<!못된 )(?:정답|해답|최종\s?답안?|(?<![가-힣])(?:제|내)?\s?답[안변]?|(?<![가-힣])(?:최종\s*)?(?:결론|선택|판단)|정정|수정)"
    r"(?!지|률|을|를|과)"
)
_ENGLISH_CUE = (
    r"\b(?:answers?(?!\s*(?:choices|options))(?:\s+(?:choice|option))?|ans|choice|solution|verdict|conclusion|correction|"
    r"(?:correct|best|right|appropriate|suitable|accurate|likely|final|my)\s+(?:option|choice|selection|response|one))\b\.?"
)
# "the correct option completing the statement is": words between an English cue and its verb.
_VERB = rf"(?P<gap>[^.,:;?!\n\ue000-\ue400]{{0,80}}?)\b(?:is|are|was|be|becomes|remains)\b\s*[:\-–—]*\s*"
_CUED = re.compile(
    rf"(?:{_KOREAN_CUE}\s*(?:\([^()\n]{{0,20}}\))?\s*(?:[은는이가]|으로는|로는)?\??\s*[:;=)\-–—→>.…]*\s*"
    rf"|{_ENGLISH_CUE}(?:\s*\([^()\n]{{0,20}}\))?(?:{_VERB}|\s*[:;=)\-–—→>]+\s*|\s*\n\s*|\s+(?={_ANY}\W*(?:\n|\Z))))"
    rf"{_FILL}(?P<option>{_ANY})",
    re.I,
)
# "정답은 폐렴(B)입니다", "the answer is pneumonia (B)": the option's text first, then its letter in brackets.
_CUED_TEXT = re.compile(
    rf"(?:{_KOREAN_CUE}\s*(?:[은는]|:)|{_ENGLISH_CUE}\s*(?:\bis\b|:))\s*(?P<gap>[^.?!\n\ue000-\ue400]{{1,60}}?)"
    rf"(?:(?P<option>{_M})|,\s*(?:즉|option|선택지)\s*(?P<named>{_ANY}))",
    re.I,
)
_SAID = r"(?:바로|가장|제일|유일한|올바른|옳은|최종|명백한|확실한|이 문제의|문제의)*\s*"
_OPTION_FIRST = re.compile(
    rf"(?P<option>{_ANY}){_GLOSS}\s*(?:(?:선택지|보기|옵션)\s*)?(?:"
    rf"(?:이|가|은|는|만|만이|이야말로)\s*{_SAID}(?:정답|답(?=이|입|임|으로|다|\W)|최종 답)|(?:이라고|라고)\s*(?:답|결론)"
    r"|(?:을|를|로|으로|이라고|라고)\s*(?:최종\s*)?(?:정답|답)?(?:으로)?\s*(?:선택|고르|고릅|골랐|고른|골라|택하|택합|결정|답하|답합|판단)"
    r"|,?\s+(?:is|would be|must be|should be|as)\s+(?:clearly |therefore |thus |indeed |definitely |probably |most likely |likely )?"
    r"(?:(?:the|my|our|a)\s+)?(?:single\s+|best\s+|most\s+|correct\s+|right\s+|final\s+|likely\s+|appropriate\s+|accurate\s+)*"
    r"(?:answer|choice|option|response)\b)",
    re.I,
)
_OPTION_TEXT_FIRST = re.compile(
    rf"(?:^|[.\n]\s*|따라서,?\s*|그러므로,?\s*)(?P<option>{_L})(?:[.):]\s*|\s+)[^.\n\ue000-\ue400]{{1,40}}?[이가]\s+정답"
)
_CHOSEN = re.compile(
    rf"\b(?:choos(?:e|ing)|chose|pick(?:ing)?|select(?:ing)?|go(?:ing)? (?:with|for)|went with|opt for|settle on)\s+{_FILL}"
    rf"(?P<option>{_ANY})|(?:고르자면|고른다면|고르라면|선택하자면|선택한다면|골라야 한다면),?\s*{_FILL}(?P<named>{_ANY})",
    re.I,
)
_END = rf"(?={_GLOSS}\s*(?:[.,!;:\n]|\Z|입니다|이다|다(?![가-힣])|임(?![가-힣])|예요|이에요|이야|[이가] 맞|라고|로 (?:보|판단)))"
_CORRECTED = re.compile(
    r"(?:(?:^|[,.!?…\n]\s*)아니(?:다|요|야)?[,.…!]+|정정(?:하면|합니다|하겠습니다)?|다시 (?:보면|보니|생각[가-힣]*|계산[가-힣]*)|\b(?:actually|wait|no|sorry)\b|"
    rf"\bcorrection)[\s,:.…]*[^.\n\ue000-\ue400]{{0,20}}?(?P<option>{_L}){_END}",
    re.I,
)
_CONCLUDED = re.compile(
    rf"(?:따라서|그러므로|그래서|결국|결론적으로|고로|므로|\b(?:therefore|thus|hence|so))[,:\s]+(?:(?:it|that)(?:'s| is| must be| would be)\s+)?"
    rf"{_FILL}(?P<option>{_L}){_END}",
    re.I,
)
# "제 생각에는 D입니다", "it's D": a sentence that says nothing but an option.
_STATED = re.compile(
    rf"(?:^|[.!?,:\n]\s*|생각(?:에|으로)[는은]?\s*|저는\s*|이는\s*|아마도?\s*|따라서,?\s*|않지만,?\s*|않으나,?\s*)(?:선택지\s*|보기\s*|바로\s*)?(?P<option>{_L}){_GLOSS}\s*"
    r"(?:입니다|이다|예요|이에요|일 것(?:입니다|이다| 같)|인 것 같습|이?라고 (?:생각합|생각한|판단|봅)|같습니다|에 해당(?:합|한|됩|된)|[와과] 일치)"
    rf"|\b(?:it's|it is|that (?:would be|is)|I(?:'d| would) say|I (?:believe|think)|definitely|probably|most likely|answer's|to (?:choose|guess|pick),)"
    rf"\s+{_FILL}(?P<named>{_L}){_END}|\b(?:corresponds to|matches|consistent with) (?:the )?(?:option|choice) (?P<last>{_L}){_END}",
    re.I,
)
# What says which option is right without saying "answer"; a review of every option says it too, so these are weak.
_IS_RIGHT = re.compile(
    rf"(?:(?:것|설명|진단|치료|처치|검사|약물|원인|선택지|보기|옵션|가장 [^.,\n\ue000-\ue400]{{1,30}}?)[은는]\s*{_FILL}(?P<option>{_ANY}){_END}"
    rf"|(?P<named>{_L}){_GLOSS}\s*(?:(?:선택지|보기|옵션)\s*)?(?:이|가|만|만이)\s*[^.,\n\ue000-\ue400]{{0,20}}?"
    r"(?<![부불])(?:맞|옳|적절|적합|타당|해당|올바|정확|최선|우선)(?![^.\n]{0,8}(?:지 않|지 못|수 없|지만|어렵))"
    rf"|\b(?:most|best)\s[^.,:;\n\ue000-\ue400]{{1,60}}\b(?:is|be)(?:: ?| )(?:option )?(?P<last>{_M}|{_P}{_END})"
    rf"|(?P<first>{_L}){_GLOSS}\s+(?:is|seems|looks|appears)\s+(?:to be )?(?:clearly |therefore |thus |the |most |best )*(?:correct|right|true|"
    r"appropriate|accurate|best)\b(?!\s+for the))",
    re.I,
)
_BARE = re.compile(
    r"^\s*(?:(?:(?:질문|문제|문항|question|Q)\s*)?[\d\ue300-\ue309]{1,3}[.):]\s*|(?:option|choice|선택지|보기)\s+|\ue000:\s*)?"
    rf"({_ANY})[.)\]:,;]*\s*(?:입니다|이다|다|임|예요|이에요)?[.!]*\s*$",
    re.M | re.I,
)
_OPENING = re.compile(
    rf"(?:(?:option|choice|선택지|보기)\s+)?({_L})(?:\s*[.):;,](?!\s*{_ANY})|\s+[-–—:]\s|\s*\(|\s*(?:입니다|이다|예요|이에요|임|다)(?![가-힣])|\s+(?:because|since)\b"
    rf"|(?<={_M})\s+\S|\s+[가-힣][^\n.?\ue000-\ue400]{{0,40}}(?<![다요])\Z)",
    re.I,
)
_LABELLED = re.compile(rf"^\s*(?:(?:option|선택지|보기)\s*)?({_L})\s*[.):]\s*\S", re.M | re.I)

# Behind an option: what takes the verdict back, makes it a condition or a question, or shares it with another option.
_NOT_MEANT = re.compile(
    rf"{_GLOSS}\s*(?:번|선택지|보기)?\s*(?:[은는](?![가-힣])|[이가]?\s*아[니닌님닙닐]|일 (?:수(?!밖)|리)|이?라면|이?라고 (?:가정|하면|착각|생각했|[볼할] 수(?:는|도)? 없|보기)"
    r"|이?라고 생각하기 쉽|[일인] 경우|[일인]지|일까|인가|같[지으기]|처럼|[로으]+ 보이[지나]|일 가능성[은이도] (?:있|낮|적)"
    r"|\s(?:is|was) (?:not|wrong|incorrect|false)|\s(?:cannot|can't|isn't)|[^.\n\ue000-\ue400]{0,12}\?)",
    re.I,
)
_NOT_RIGHT = re.compile(
    r"(?:이|은|으로|에서|일|이라고|이라|인|으로는|라고)?\s*(?:아[니닌님닙닐]|될 수 없|수 없|수는 없|제외|이?라면|인지|일까|처럼|같[지으기]|보이[지나]|보기 어렵|어렵"
    r"|생각(?:하기 쉽|했)|경우|수(?:도)? 있|하지 않|하면 안|지 않)|\s*(?:if|for another)\b|[^.\n\ue000-\ue400]{0,8}\?"
)
_SHARED = re.compile(rf"[^.\n\ue000-\ue400]{{0,30}}?(?:또는|혹은|아니면|\bor)\s*(?:option\s*|선택지\s*|possibly\s*|maybe\s*)?{_ANY}")
_SHARED_TEXT = re.compile(rf"\.?[^.\n\ue000-\ue400]{{0,40}}?(?:또는|혹은|아니면|\bor)\s*(?:option\s*|선택지\s*)?{_ANY}")
_IF = re.compile(r"(?:만약|만일|\b(?:if|whether|suppose|unless|assuming)\b)[^.,\n]{0,40}\Z|\b(?:not|n't|wrong|incorrect|other|why)\s+(?:the\s+)?\S*\s*\Z", re.I)
_ARTICLE = re.compile(r" (?=\d+-year|[a-z])(?!(?:because|since|as|and|or|but|for|due|which|in|is|based|with|while|given|whereas|so|not|then)\b)")
_DENIED = re.compile(
    rf"({_ANY}){_GLOSS}(?:은|는|이|가|도)?\s*(?:정답|답)(?:이|은|으로|에서|일|이라고)?\s*(?:아[니닌님닙닐]|될 수 없|수 없|제외)"
    rf"|({_ANY}){_GLOSS}\s+(?:is not|isn't|cannot be|can't be)\s+(?:the\s+)?(?:\w+\s+)?(?:answer|option|choice)"
    rf"|(?:answer|정답[은이])\s*(?:is not|isn't|cannot be|can't be)?\s+(?:not\s+)?({_ANY})\s*(?:[이가]\s*아[니닌님닙닐])",
    re.I,
)
_RIVAL = re.compile(
    rf"({_ANY}){_GLOSS}(?:도|\s*역시|\s*또한)\s*[^.\n\ue000-\ue400]{{0,12}}?(?<![부불])(?:정답|답이|가능|맞|옳|적절)(?![^.\n]{{0,8}}(?:아[니닌님닙닐]|지 않|없|으나|지만))"
    rf"|({_ANY}){_GLOSS}\s+(?:(?:could|might|may|can)\s+(?:also|equally|well)|is also|is equally)\s+(?:be\s+)?(?:\w+\s+)?(?:correct|right|possible|acceptable|true|the answer)"
    rf"|(?:^|[.,;]\s*)(?:or|maybe|perhaps|possibly)\s+(?:even\s+|possibly\s+|maybe\s+)?({_L})\s*(?:[?\n)]|\.\s|\.?\Z)",
    re.I,
)


def _verdicts(text: str) -> list[_Verdict]:
    """All verdicts in `text`, in order of where they end."""
    found: list[_Verdict] = []

    def add(match: re.Match[str], strength: int, unless: re.Pattern[str]) -> None:
        name = next(n for n in ("option", "named", "last", "first") if match.groupdict().get(n))
        option, end = match[name], match.end(name)
        meant_a_word = option in "\ue000\ue008" and _ARTICLE.match(text, end)
        denied = re.search(r"\b(?:not|cannot|never|whether|if|depends|unclear|wrong|incorrect)\b|n't", match.groupdict().get("gap") or "", re.I)
        aside = text[match.start() - 1 : match.start()] == "(" and re.fullmatch(r"정답\s*", text[match.start() : match.start(name)])
        if meant_a_word or denied or aside or unless.match(text, match.end()) or _IF.search(text, 0, match.start()):
            return
        shared = _SHARED.match(text, end) or _SHARED_TEXT.match(text, end)
        found.append(_Verdict(match.start(), end, None if shared else _index(option), strength))

    for pattern, strength, unless in (
        (_CUED, _STRONG, _NOT_MEANT),
        (_CUED_TEXT, _STRONG, _NOT_MEANT),
        (_OPTION_FIRST, _STRONG, _NOT_RIGHT),
        (_OPTION_TEXT_FIRST, _STRONG, _NOT_RIGHT),
        (_CHOSEN, _STRONG, _NOT_MEANT),
        (_CORRECTED, _STRONG, _NOT_MEANT),
        (_CONCLUDED, _MIDDLE, _NOT_MEANT),
        (_STATED, _MIDDLE, _NOT_MEANT),
        (_TICKED, _WEAK, _NOT_MEANT),
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
        if match[1] == _SEVERAL or re.fullmatch(_L, match[1]) or (whole and re.fullmatch("[\ue200-\ue219]", match[1])):
            found.append(_Verdict(match.start(1), match.end(1), _index(match[1]), _STRONG if last else _MIDDLE))
    labelled = [_index(m[1]) for m in _LABELLED.finditer(text)]
    opening = _OPENING.match(text)
    if opening and not _NOT_MEANT.match(text, opening.end(1)):
        in_order = len(labelled) > 1 and labelled[1] == labelled[0] + 1 and not _OTHERS.search(text)
        if not in_order:
            found.append(_Verdict(0, opening.end(1), _index(opening[1]), _MIDDLE))
    head, _, tail = text.rpartition("\n")
    final = _LABELLED.match(tail)
    if final and len(labelled) == 1 and _index(final[1]) != 0 and re.search(r"[.!다요음임]\s*\Z", head):
        start = len(head) + 1
        found.append(_Verdict(start, start + final.end(1), _index(final[1]), _MIDDLE))
    return found


_OTHERS = re.compile(r"다른|나머지|오답|틀린|\b(?:other|others|incorrect|wrong)\b", re.I)

# ---- 3. decide ------------------------------------------------------------------------------------------------------

_TURN = re.compile(
    r"아니[,.…!다요야]|다시|정정|수정|따라서|그러므로|결론|결국|최종|하지만|그러나|그런데|다만|재검토|재계산|잠깐|사실은?|오히려|[가-힣]지만|으나|므로\b"
    r"|\b(?:therefore|thus|hence|so|however|but|wait|actually|correction|corrected|reconsider\w*|second thought|final|finally|instead|sorry|"
    r"mistake|no)\b",
    re.I,
)
_NEXT_QUESTION = re.compile(
    r"\n\s*#*\s*(?:다음\s*)?(?:질문|문제|문항|\bquestion|\bQ)\s*(?:[\d\ue300-\ue309]*\s*(?:\([^()\n]*\))?\s*[:.)]|[\d\ue300-\ue309]+\s*\n)", re.I
)
_QUESTION_NUMBER = re.compile(rf"(?:질문|문제|문항|question|Q)\s*(\d+)\S{{0,2}}\s*(?:의)?\s*(?:정답|답|answer)|(\d+)번 (?:문제|문항|질문)의? ?(?:정답|답)", re.I)


def _decide(text: str) -> int | None:
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
        if _index(match[match.lastindex or 1]) == last.option:
            return None
    for match in _RIVAL.finditer(text, last.end):
        if _index(match[match.lastindex or 1]) != last.option:
            return None
    return last.option


def parse(output: str, letters: str = LETTERS[:5]) -> str | None:
    """The one of `letters` that `output` gives as its answer; None when it gives none, several, or does not say.

    Never a guess: refusals, outputs that were cut off, echoes of the options and bare values ("50", "2년") are None.
    Option numbers count from 1 ("3번" is C). `letters` are the question's options in order.
    """
    text = _normalise(output)
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
    """How much of the format of `prompts` an answer keeps: each of `fields` (see records.FIELDS), then one final letter.

    `score` is in [0, 1]. It says nothing about the answer being right; `score_total` adds that.
    """
    text = _one_turn(output)
    heads = [(match[1], match.start(), match.end()) for match in re.finditer(r"^[ \t]*([a-z_]+)[ \t]*:", text, re.M)]
    heads = [head for head in heads if head[0] in (*fields, "answer")]
    bodies = [text[end:nxt[1]] for (_, _, end), nxt in zip(heads, [*heads[1:], ("", len(text), 0)], strict=True)]
    place = {name: i for i, name in enumerate(fields)}
    kept: list[str] = []
    for (name, _, _), body in zip(heads, bodies, strict=True):
        in_order = name in fields and all(place[earlier] < place[name] for earlier in kept)
        if in_order and body.strip():
            kept.append(name)
    names = [name for name, _, _ in heads]
    answered = names.count("answer") == 1 and names[-1] == "answer" and bodies[-1].strip() in tuple(letters)
    missing = tuple(name for name in fields if name not in kept)
    return FormatScore((len(kept) + answered) / (len(fields) + 1), tuple(kept), missing, answered)


def score_total(format_score: float, correct: bool) -> float:
    """One third format, two thirds correctness: the total of the scripts that medlora replaces (medgemma_korean)."""
    return format_score / 3 + 2 * correct / 3
