"""Text that is not UTF-8: Korean code pages and Excel's UTF-16, recognised by the first bytes and read as UTF-8."""

from __future__ import annotations

import codecs
import io
import re
from typing import Any

NAMES = {"cp949": "CP949 (EUC-KR)", "utf-16": "UTF-16"}
"""What a note calls an encoding."""


_HANGUL = re.compile("[가-힣]")


_PLAUSIBLE = re.compile("[가-힣ㄱ-ㆎ一-鿿①-⓪㈀-㋿　-〿！-～°±×÷·′″℃Ωα-ωΑ-Ω←-⇿≤≥∼…‘-”‰㎀-㏿½-⅞²³¹■-◿★☆]")
"""Characters of Korean text beside ASCII."""


def recognise(sample: bytes) -> str:
    """The encoding of a file by its first bytes: `utf-16` by its mark, `cp949` where it is Korean and no UTF-8, else `utf-8`.

    A UTF-8 file with a broken line stays UTF-8: CP949 must read every byte, and its words must be Korean.
    """
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(sample)
        return "utf-8"
    except UnicodeDecodeError:
        pass
    try:
        text = codecs.getincrementaldecoder("cp949")().decode(sample)
    except UnicodeDecodeError:
        return "utf-8"
    # Japanese and Chinese code pages also read as CP949: as syllables that no Korean writes, or with many Hanja.
    common = sum(len(char.encode("euc_kr", "ignore")) == 2 for char in _HANGUL.findall(text))
    hanja = sum("\u4e00" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff" for char in text)
    particles = sum(char in "은는이가을를의에다하" for char in text)
    wide = [char for char in text if char > "\x7f"]
    korean = sum(map(bool, map(_PLAUSIBLE.match, wide)))
    words = len(_HANGUL.findall(text))
    as_utf8 = len(_HANGUL.findall(sample.decode("utf-8", "ignore")))
    fits = words >= 2 and words > 4 * as_utf8 and korean >= 0.95 * len(wide)
    return (
        "cp949" if fits and common >= 0.9 * words and (hanja <= 0.2 * words or particles >= 0.15 * words) else "utf-8"
    )


class Recoded(io.RawIOBase):
    """A stream of another encoding as UTF-8; bytes that the encoding does not know stay, and so are no UTF-8 either."""

    def __init__(self, stream: Any, encoding: str) -> None:
        errors = "replace" if encoding == "utf-16" else "surrogateescape"
        self.stream, self.decoder, self.ready = stream, codecs.getincrementaldecoder(encoding)(errors), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            content = self.stream.read(len(buffer))
            self.ready = self.decoder.decode(content, final=not content).encode("utf-8", "surrogateescape")
            if not content:
                break
        taken, self.ready = self.ready[: len(buffer)], self.ready[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self.stream.close()
        super().close()
