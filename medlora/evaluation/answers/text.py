"""Model output -> the same text with everything that can be an option spelled as one private-use character.

Behind `normalise`, `B`, `(b)`, `②`, `2번` and `**B**` are one character each; letters that belong to a name
(`비타민 D`, `B형 간염`, `E. coli`, `τ = F/A`) are no option. A list of options (`A와 C`) is one character that means none.
Options that are excluded (`A가 아니라`) and echoes of the option list are gone. `answers` reads the rest.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from medlora.evaluation.answers.denials import mark_denied
from medlora.evaluation.answers.shapes import flatten

# Private-use blocks: option written plainly (B), marked as an option ((B), ②, 2번), in lower case (b), as a digit (2).
_PLAIN, _MARKED, _SMALL, _DIGIT, SEVERAL = 0xE000, 0xE100, 0xE200, 0xE300, "\ue400"


PLAIN, MARKED = "[\ue000-\ue019]", "[\ue100-\ue119]"


OPTION = "[\ue000-\ue119]"  # written plainly or marked: an option wherever it is


ANY = "[\ue000-\ue319\ue400]"  # also lower case, a digit, or several at once: an option where a verdict is expected


_LOOKALIKES = str.maketrans("АВСЕНІЈКМОРЅТХасеΑΒΕΖΗΙΚΜΝΟΡΤΧ", "ABCEHIJKMOPSTXaceABEZHIKMNOPTX")


_ENCLOSED = {
    ord(c): f"({i}번)"
    for row in ("①②③④⑤⑥⑦⑧⑨⑩", "❶❷❸❹❺❻❼❽❾❿", "➀➁➂➃➄➅➆➇➈➉", "➊➋➌➍➎➏➐➑➒➓", "⓵⓶⓷⓸⓹⓺⓻⓼⓽⓾")
    for i, c in enumerate(row, 1)
}


_ENCLOSED |= {
    first + i: f"({chr(65 + i)})" for first in (0x24B6, 0x24D0, 0x249C, 0x1F150, 0x1F170, 0x1F130) for i in range(26)
}


# ㉠ ㉮ ㈀ ㈎ ⑴: circled and bracketed Hangul, bracketed digits.
_ENCLOSED |= {first + i: f"({i + 1}번)" for first in (0x3260, 0x326E, 0x3200, 0x320E, 0x2474) for i in range(10)}


# Letters inside a name are no options: "비타민 D", "hepatitis B", "E. coli", "C 언어".
_NAMES = re.compile(
    r"((?:비타민|간염|인플루엔자|면역글로불린|코엔자임|암포테리신|지단백|인자|그룹|타입|유형|등급|환자|"
    r"약물|물질|용액|지점|집단|"
    r"\b(?:vitamin|hepatitis|influenza|group|type|factor|protein|immunoglobulin|coenzyme|amphotericin|"
    r"cyclosporine?|grade|"
    r"stage|phase|class|serotype|serogroup|toxin|patient|drug|substance|subtype|apolipoprotein|Child[- ]Pugh))[ \-]?)"
    r"\(?[A-J]\)?(?![A-Za-z])"
    r"|\b[A-J](?=\s(?:cells?|lymphocytes?|peptide|dimer|symptoms|fib|section)\b|\s(?:교수|선생|원장|세포|림프구|언어|"
    r"형(?=[\s은는이가])|"
    r"다이머|펩타이드|반응성))"
    r"|\b[A-J]\. ?(?=coli|pylori|influenzae|difficile|diff\b|perfringens|botulinum|tetani|albicans|"
    r"trachomatis|jejuni|neoformans|diphtheriae|"
    r"cereus|anthracis|fragilis|pertussis|henselae|baumannii|fumigatus|faecalis|faecium|histolytica|"
    r"cloacae|granulosus)",
    re.I,
)


# What may follow a letter directly in Korean without making it part of a word (B입니다, B가; not B형, B세포).
_ENDING = (
    r"(?:번|항(?![가-힣])|안(?![가-힣])|입니|이[다며고므라지었에야나]|이(?=[\s,.])|다(?![가-힣])|임|"
    r"인(?!자)|일|였|예|요(?![가-힣])|에[요서]|[가은는을를로와과"
    r"나도만의에야죠지뿐라](?![가-힣]{3})|로서|라고|라는|라면|라서|이라|보다|만이|까지|밖에|뿐|외에|말고|처럼|또는|혹은|및|중)"
)


_EDGE_LEFT = r"(?<![A-Za-z0-9_=+^\\/&'])(?<![A-Za-z0-9]-)"


_EDGE_RIGHT = r"(?![A-Za-z0-9_^+/%℃°]|'[a-z]|[-–][A-Za-z0-9가-힣]|\s*[=≈×÷^∝≤≥]|[가-힣])"


# "A patient", "I think": an article and a pronoun, unless a word follows that can follow an option.
_NO_WORD = (
    r"(?!(?<=A) (?=[a-z]|\d+-year)(?!(?:because|since|as|and|or|but|for|due|which|in|is|based|with|"
    r"while|given|whereas|so|not|then|"
    r"seems|looks|appears|must|would|should|could|can|cannot|may|might|will|was|are|has|does|matches|"
    r"corresponds|fits|rather)\b))"
    r"(?!(?<=I) (?=[a-z])(?!(?:because|since|as|and|or|is|seems|looks|appears|matches|fits)\b))"
)


_PLAIN_LETTER = re.compile(
    rf"{_EDGE_LEFT}([A-Z]){_NO_WORD}(?:(?={_ENDING})(?:번|항(?![가-힣])|안(?![가-힣]))?|{_EDGE_RIGHT})"
)


_SMALL_LETTER = re.compile(rf"{_EDGE_LEFT}([a-j])(?:(?={_ENDING})|(?! [A-Za-z]|\.[A-Za-z]){_EDGE_RIGHT})")


_MARKED_LETTER = re.compile(
    r"(?<![A-Za-z0-9_])[(\[{<]\s?([A-Za-z])\s?[)\]}>](?![A-Za-z0-9_'^]|\s*=)(?:번|항(?![가-힣]))?"
)


_NUMBERED = re.compile(
    r"(?<![\d.제])(?<!하루 )(?<!1일 )(?<!매일 )(?<!매주 )(?<!주 )[(\[]?(10|[1-9])\s?\)?번(?!째|[ 의]*(?:문제|문항|질문|문(?!\w)|이상|이하|"
    r"씩|정도|반복|복용|투여|더 |뇌신경|염색체|요추|경추|흉추|천추|목뼈|허리뼈|등뼈|늑골|갈비|환자|방문|측정)|호|지\b)[)\]]?번?"
)


# "Option 2", "2)가", "답은 2).": a digit that can only number an option.
_NUMBER_OF_OPTION = re.compile(
    r"(?<=(?:option|choice) )#?([1-9])(?![\d.%])|(?:(?<=선택지 )|(?<=보기 ))([1-9])(?![\d.%]|\s*(?:개|가지|종|차))"
    r"|(?<![\d.(A-Za-z])([1-9])\)(?=[이가을를로]\s)|(?<=답[은는:])\s*([1-9])\)(?=\s*\.?\s*(?:\Z|\n))|(?<=answer: )#([1-9])(?!\d)",
    re.I,
)


_BARE_DIGIT = re.compile(
    r"(?<=답은 )([1-9])(?=[이가]\s*아니)|(?<![\d.,\-/=≈~])[(\[]?(10|[1-9])[)\]]?(?=\s*(?:입니다|이다|이며|임|예요|이에요|이 정답|가 정답|"
    r"\Z|\n)|(?<![\n\d].)(?<!\A.)[.)](?:\s|\Z))"
)


_AND = (
    r"(?:,\s*(?:and|or|및|또는|혹은|그리고)?|&|·|~|와|과|이?나|및|또는|혹은|아니면|이?거나|이?랑|하고|그리고|"
    r"and/or|and|or|vs\.?)"
)


_LIST = re.compile(
    rf"{ANY}(?:\s*\([^()\n]{{0,40}}\))?(?:\s*{_AND}\s*(?:(?:option|choice|선택지|"
    rf"보기)\s*)?{ANY}(?:\s*\([^()\n]{{0,40}}\))?"
    r"(?!\s*(?:[은는](?![가-힣])|이? 아니|가 아니|is\b|are (?:not|in|wr)|was\b|because\b|인 \S+ 틀)))+"
)


# "A가 아니라", "not A but", "A보다는", "rather than A": the option that is excluded.
_SET_ASIDE = re.compile(
    rf"{ANY}(?:\s*\([^()\n]{{0,40}}\))?(?:이|가|은|는)?\s*아니(?:라(?![고면서])|고|며)[,\s]*|"
    rf"{ANY}보다는?\s*|(?:{ANY}(?:이|가|도)?\s*)+아닌\s+(?={ANY})"
    rf"|{ANY}[\s,.…\-]*(?:아니[요다]?|\b(?:no|wait|sorry|actually|I mean)\b)[\s,]*(?:(?:no|wait|sorry|"
    rf"actually)\b[\s,]*)*(?={ANY})"
    rf"|(?<=답[은:] ){ANY}\s*→\s*(?={ANY}\s*(?:\.|\n|\Z))"
    rf"|,?\s*\bnot\s+(?:option\s+)?{ANY}\s*(?:\([^()\n]{{0,40}}\)\s*)?,?\s*\bbut\b"
    rf"|,?\s*\b(?:rather than|instead of|and not|over)\s+(?:option\s+)?{ANY}|,\s*not\s+(?:option\s+)?{ANY}"
    rf"|\b(?:between|among|of|from|out of)\s+{SEVERAL}\s*,?|{SEVERAL}\s*(?:중(?:에서|에)?|가운데)(?:는|도)?\s*",
    re.I,
)


_SYLLABLES = "가나다라마바사아자차"


_JAMO = unicodedata.normalize("NFKC", "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊ")


# "(나)", "'라'", and "정답: 다": syllables that number options, where they are marked or the whole of an answer.
_LETTERED = f"[{_SYLLABLES}{_JAMO}]"


_SYLLABLE = re.compile(
    rf"[(\[]\s?({_LETTERED})\s?[)\]](?:번|항)?|[\"'“‘「『]({_LETTERED})[\"'”’」』]"
    rf"|(?<![가-힣])({_LETTERED})번(?=\s*(?:입니다|이다|이\s|\.|\n|\Z))"
    rf"|(?:(?<=답[은는:])|(?<=답 :)|(?<=answer:)|(?<=아니라))\s*(?!가\s?입)({_LETTERED})번?(?=\s*(?:입니다|이다|이에요|예요|임(?![가-힣])|[이가]\s*아니|\.|\n|\Z))"
)


_ORDINALS = (
    "첫",
    "두",
    "세",
    "네",
    "다섯",
    "첫째",
    "둘째",
    "셋째",
    "넷째",
    "다섯째",
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
)


_ORDINAL = re.compile(
    r"(?:\bthe\s+)?(다섯째|[첫둘셋넷]째|첫|두|세|네|다섯|first|second|third|fourth|fifth)(?:\s?번째)?\s*(선택지|보기|옵션|항목|option|choice)",
    re.I,
)


def _order(syllable: str) -> int:
    return _SYLLABLES.index(syllable) if syllable in _SYLLABLES else _JAMO.index(syllable)


def one_turn(text: str) -> str:
    """The model's own final turn: no private-use characters, nothing behind an end-of-turn token, no thinking."""
    text = re.sub("[\ue000-\uf8ff\u200b-\u200f\u2060\ufeff]", "", re.sub(r"\r\n?", "\n", text))
    text = re.sub(r"\A(?:\s|<bos>|<s>|<start_of_turn>(?:model)?|<\|[a-z][a-z_]+\|>(?:assistant\b)?)+", "", text)
    text = re.split(r"<(?:eos|end_of_turn|start_of_turn|/s)>|<\|[a-z][a-z_]+\|>", text, maxsplit=1)[0]
    text = re.sub(r"<(think|thinking|reasoning)>.*?(?:</\1>|<\1/>)", "\n", text, flags=re.S | re.I)
    if re.search(r"<(?:think|thinking)>", text, re.I):  # cut off while still thinking
        return ""
    return re.split(r"</(?:think|thinking|reasoning)>|<R/>", text, flags=re.I)[-1]


def plain_text(output: str) -> str:
    """The model's own turn with look-alikes folded and markdown, LaTeX and quotes gone; line breaks stay."""
    text = one_turn(output).translate(_ENCLOSED)
    text = unicodedata.normalize("NFKC", text.translate(_LOOKALIKES)).translate(_LOOKALIKES)
    text = re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ \t]{3,}", "  ", text))  # runs of space cost time and mean nothing
    text = re.sub(r"[’‘`´]", "'", text)
    text = flatten(re.sub(r"\bi\. ?e\.", "that is", text))
    text = _SYLLABLE.sub(lambda found: chr(_SMALL + _order(next(filter(None, found.groups())))), text)
    text = _ORDINAL.sub(lambda found: f"{found[2]} ({_ORDINALS.index(found[1].lower()) % 5 + 1}번)", text)
    text = re.sub(r"</?(?:b|i|u|p|em|strong|div|span)>", "", re.sub(r"<br\s*/?>", "\n", text))
    text = re.sub(r"[=\-]>|[⇒➜➔➡👉⟶]", "→", text)
    text = re.sub(r"[*_]{2}\s*[(\[\"']*([A-Za-z])[)\]\"']*\s*[*_]{2}(?![A-Za-z])", r"(\1)", text)
    text = re.sub(
        r"\*|__|[\"“”「」『』«»$]|\\[()\[\]]|^[ \t]*(?:#+|>+|[-•▶■●◆✅☑★⭐]+)(?=\s|[가-힣A-Z(])", "", text, flags=re.M
    )
    text = re.sub(r"(?<![A-Za-z])'|'(?![A-Za-z])|~~[^~\n]*~~", "", text)  # apostrophes stay
    text = re.sub(r"(답|answer|choice)\s*=\s*", r"\1: ", text, flags=re.I)
    text = re.sub(r"[\[【<]\s*((?:최종\s*)?(?:정답|답안?|answer|final answer))\s*[\]】>]", r"\1:", text, flags=re.I)
    return re.sub(r"\[\[([A-Za-z])\]\]", r"[\1]", text)


def _place(block: int, mark: str) -> str:
    return chr(block + (int(mark) - 1 if mark.isdigit() else ord(mark.upper()) - 65))


def _options(text: str) -> str:
    """Text with every option spelling replaced by its private-use character."""

    def mark(block: int) -> Callable[[re.Match[str]], str]:
        return lambda found: _place(block, next(filter(None, found.groups())))

    text = _NAMES.sub(lambda found: f"{found[1] or ''}_", text)
    text = _NUMBERED.sub(mark(_MARKED), text)
    text = _NUMBER_OF_OPTION.sub(mark(_MARKED), text)
    text = re.sub(rf"\(\s*({MARKED})\s*\)", r"\1", text)
    text = _MARKED_LETTER.sub(mark(_MARKED), text)
    text = _PLAIN_LETTER.sub(mark(_PLAIN), text)
    text = _SMALL_LETTER.sub(mark(_SMALL), text)
    # A digit that the reasoning computed ("= 3") is a value, not the third option.
    computed = set(re.findall(r"[=≈]\s*(\d+)(?![\d.])", text))
    text = _BARE_DIGIT.sub(lambda found: found[0] if (found[1] or found[2]) in computed else mark(_DIGIT)(found), text)
    # "C(3번)": the same option named twice.
    return re.sub(rf"({ANY})[ \t]?({MARKED})", lambda f: f[2] if index_of(f[1]) == index_of(f[2]) else SEVERAL, text)


def index_of(option: str) -> int | None:
    """Place of an option character in the alphabet; None for several options at once."""
    return None if option == SEVERAL else ord(option) & 0xFF


_SAYS = re.compile(
    r"답|따라서|틀|맞|옳|아니|아닌|아닙|\b(?:no|not|wait|sorry)\b|answer|therefore|correct|wrong|because", re.I
)


TICKED = re.compile(
    rf"^[ ]*(?P<option>{OPTION})\s*[.):\-](?:[^\n]*[✓✔✅⭕]|\s*\(?(?:정답|맞음|옳음|correct|"
    r"this is the (?:correct|right|best))(?! ?(?:이? ?아|answer)))",
    re.I | re.M,
)


EXAMPLES = {
    "_NAMES": ("비타민 D", "정답 D"),
    "_PLAIN_LETTER": ("B입니다", "B형 간염"),
    "_SMALL_LETTER": ("b입니다", "a patient"),
    "_MARKED_LETTER": ("(B)", "f(B)"),
    "_NUMBERED": ("2번", "하루 2번"),
    "_NUMBER_OF_OPTION": ("선택지 2", "선택지 2개"),
    "_BARE_DIGIT": ("정답은 2입니다", "정답은 2년"),
    "_LIST": ("A와 C", "A와 폐렴"),
    "_SET_ASIDE": ("A가 아니라 B", "A가 정답"),
    "_SYLLABLE": ("정답: 다", "정답이다"),
    "_ORDINAL": ("두 번째 선택지", "두 번째 환자"),
    "_SAYS": ("B가 맞다", "A. 폐렴 B. 천식"),
}
"""A text that each pattern must read, and one that it must not; tests/test_patterns.py tries both."""


def _without_echo(text: str) -> str:
    """Text without lists of options: lines or parts of a line that begin with A, B, C, ... in order."""
    lines = text.split("\n")
    head = re.compile(
        rf"\s*(?:(?:option|선택지|보기)\s*)?({OPTION}(?=\s*[.):,])|{MARKED}(?=\s+\S)|[\ue200-\ue219](?=\s+\S))"
    )
    run: list[int] = []
    for number, line in [*enumerate(lines), (len(lines), "end")]:
        found = head.match(line)
        inline = [index_of(o) for o in re.findall(rf"{OPTION}(?=\s*[.):])", line)]
        marked = [index_of(o) for o in re.findall(MARKED, line)]
        listed = next((o for o in (inline, marked) if len(o) > (o is marked) + 1 and o == [*range(len(o))]), None)
        if (
            listed
            and not _SAYS.search(line)
            and re.match(rf"\s*(?:(?:보기|선택지|options?|choices)\W+)?{OPTION}", line, re.I)
        ):
            lines[number] = ""
        elif found and index_of(found[1]) == len(run):
            run.append(number)
        elif line.strip():
            if len(run) > 1:
                ticked = [echoed for echoed in run if TICKED.match(lines[echoed])]
                for echoed in run:
                    if ticked != [echoed]:
                        lines[echoed] = ""
            run = [number] if found and index_of(found[1]) == 0 else []
    return "\n".join(lines)


def _several(found: re.Match[str]) -> str:
    options = {index_of(option) for option in re.findall(ANY, found[0])}
    return (
        chr(_MARKED + min(o for o in options if o is not None))
        if len(options) == 1 and None not in options
        else SEVERAL
    )


def mark_options(output: str) -> str:
    """The output as plain text with an option character for every option, nothing left out yet."""
    return _options(plain_text(output))


def normalise(output: str) -> str:
    """The text that verdicts are read from: what is denied is marked, lists and echoes of options are gone."""
    text = mark_options(output)
    text = _without_echo(text)
    text = re.sub(rf"^\s*{MARKED}\s*[:\-–.]\s*(?={ANY})", "", text, flags=re.M)  # "1번: B": the number of the question
    text = _LIST.sub(_several, mark_denied(text))
    return _SET_ASIDE.sub("", text).strip()
