"""What the parts of a config share: frozen sections, names, prompt styles, scoring modes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
"""Names become folder and adapter names: letters, digits, `_` and `-`, so that none can leave its folder."""


PlainStyle = Literal["reasoning", "answer", "kormedmcqa"]
"""Styles without a worked example, which a phase's `full_prompt` adds by itself."""


class Section(BaseModel):
    """A part of the config: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Scoring = Literal["letter", "generate", "reason", "option_text"]


McqStyle = Literal["reasoning", "reasoning_full", "answer", "kormedmcqa"]
