"""What a chat template writes around a question and an answer, found by rendering it, never by a family's name."""

from __future__ import annotations

import ctypes
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from medlora.errors import InputError

log = logging.getLogger(__name__)

Turn = tuple[str, str]
"""Role (`user` or `assistant`) and text."""
Render = Callable[..., str]
"""What a template makes of messages, called with them and `add_generation_prompt`."""

Made = TypeVar("Made")

OPTIONS: dict[str, object] = {
    # Each family has its own name for an answer without reasoning.
    "enable_thinking": False,
    "thinking": False,
}
"""What every template is called with."""

LIMIT_S = 60
"""Seconds for one rendering, which takes about a tenth of a millisecond; a busy machine must never reach them."""
_LOOK_S = 1.0

_DATE = datetime(2024, 7, 26)
"""Templates that write today's date would give other tokens tomorrow; this is the day that Llama 3.1's falls back to."""
_DATE_MACRO = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace('%{letter}', '{_DATE.strftime('%' + letter)}')" for letter in "aAbBdeHIjmMSyYp")
    + " }}{%- endmacro %}\n"
)

_ASKED, _ANSWERED = "What is asked?", "What is answered."
_OPENINGS = re.compile(
    r"<(?P<tag>(?:\w+:)?(?:think|thinking|thought|reason|reasoning))>"
    r"|\[(?P<bracket>THINK|THOUGHT)\]"
    r"|<\|(?P<start>START_THINKING|begin_of_thought|think_start)\|>"
    r"|(?P<channel><\|channel>thought)"
)


@dataclass(frozen=True, slots=True)
class Convention:
    """How a template is to be called, and what it writes around an assistant's answer."""

    parts: bool
    """Whether it wants a turn's content as a list of parts instead of a text."""
    lead: str
    """What it writes between its generation prompt and the answer: gpt-oss names a channel there, most write nothing."""
    end: str | None
    """What it writes behind the last answer; None where it does not render an answer."""
    between: str
    """What it writes behind an earlier answer, the next question included: Phi-3 adds EOS to the last one alone."""
    closes: str
    """What closes the reasoning that its generation prompt leaves open; empty for most."""


def learn(render: Render, name: str) -> Convention:
    """Ask a template how it writes turns; raises InputError, led by `name`, where it cannot write a question."""
    asked: list[Turn] = [("user", _ASKED)]
    wrong: list[str] = []
    for parts in (False, True):
        try:
            prompt = render(_pack(asked, parts), add_generation_prompt=True)
        except Exception as error:  # a template is a program of its author, and may raise anything
            wrong.append(f"it raises {_shorten(error)}")
            continue
        if _ASKED in prompt:
            break
        wrong.append("it leaves out what the user asks")
    else:
        found = wrong[0] if wrong[0] == wrong[1] else f"given a text {wrong[0]}, given content parts {wrong[1]}"
        raise InputError(
            f"{name}: {found}; put the template of the model's author in its place, or remove it: without one, prompts are plain text"
        )
    closes = _close_reasoning(prompt.rpartition(_ASKED)[2])
    prompt += closes
    answered: list[Turn] = [*asked, ("assistant", _ANSWERED)]
    before, at, end = _try_render(render, answered, parts).rpartition(_ANSWERED)
    lead = before[len(prompt) :] if at and before.startswith(prompt) else ""
    between = _try_render(render, [*answered, ("user", "And then?")], parts).rpartition(_ANSWERED)[2]
    return Convention(parts, lead if lead.strip() else "", end if at else None, between if at else "", closes)


def learn_in_time(render: Render, name: str) -> Convention:
    """The same within LIMIT_S a rendering."""
    return render_in_time(render, name, lambda limited: learn(limited, name))


def _try_render(render: Render, turns: Sequence[Turn], parts: bool) -> str:
    """Turns as the template writes them; empty where it raises, since some render questions alone and are fine for these."""
    try:
        return render(_pack(turns, parts), add_generation_prompt=False)
    except Exception as error:  # as in `learn`
        log.debug("a chat template raises %s, given %d turns", _shorten(error), len(turns))
        return ""


def write_prompt(render: Render, convention: Convention, turns: Sequence[Turn], name: str) -> str:
    """The turns as the model sees them, up to where its answer begins; raises InputError where one of them is missing."""
    try:
        prompt = render(_pack(turns, convention.parts), add_generation_prompt=True)
    except Exception as error:
        raise InputError(f"{name}: it raises {_shorten(error)}, given {len(turns)} turns") from error
    missing = next((text for _, text in turns if text.strip() not in prompt), None)
    if missing is not None:
        raise InputError(f"{name}: it leaves out or changes a turn: {missing.strip()[:80]!r}")
    return prompt + convention.closes + convention.lead


class _Endless(BaseException):
    """Raised inside a rendering that does not end; no Exception, which a template's own errors are caught as."""


def render_in_time(render: Render, name: str, act: Callable[[Render], Made]) -> Made:
    """What `act` makes with a renderer; raises InputError, led by `name`, where one rendering takes longer than LIMIT_S.

    jinja's sandbox lets a template loop for hours, and a short conversation need not show it. A signal would reach the
    main thread alone, and workers render in others. So a thread looks on, one for all renderings of `act`, and raises
    in this one. It counts its looks, not the time: a process that was stopped for an hour has done nothing wrong.
    """
    asking, begun, ended = threading.get_ident(), [0], threading.Event()

    def count(*arguments: Any, **options: Any) -> str:
        begun[0] += 1
        return render(*arguments, **options)

    def look_on() -> None:
        seen, looks = 0, 0
        while not ended.wait(_LOOK_S):
            seen, looks = begun[0], looks + 1 if begun[0] == seen else 0
            if looks * _LOOK_S >= LIMIT_S:
                looks = 0
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(asking), ctypes.py_object(_Endless))

    watch = threading.Thread(target=look_on, name="medlora-template", daemon=True)
    watch.start()
    try:
        try:
            return act(count)
        finally:
            ended.set()
            watch.join()
    except _Endless:
        ended.set()
        raise InputError(
            f"{name}: writing one prompt did not end in {LIMIT_S} s; a template of the model's makers ends at once, so put "
            "theirs in its place"
        ) from None


def _pack(turns: Sequence[Turn], parts: bool) -> list[dict[str, object]]:
    return [{"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turns]


def _shorten(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    line = getattr(error, "lineno", None)
    return f"{type(error).__name__}{f' in line {line}' if line else ''}: {first[:200]}"


def _close_reasoning(tail: str) -> str:
    """What closes the last block of reasoning that `tail`, the generation prompt, leaves open; empty where none is."""
    openings = [*_OPENINGS.finditer(tail)]
    if not openings:
        return ""
    found = openings[-1]
    closing = _name_closing(found)
    behind = tail[found.end() :]
    if closing in behind:
        return ""
    if not found["tag"]:
        return closing if found["bracket"] or found["start"] or behind.endswith("\n") else f"\n{closing}"
    # The empty block as Qwen3 writes it; DeepSeek's distills and their kin know it, too.
    lines = len(behind) - len(behind.rstrip("\n"))
    return "\n" * max(2 - lines, 0) + f"{closing}\n\n"


def _name_closing(opening: re.Match[str]) -> str:
    if tag := opening["tag"]:
        return f"</{tag}>"
    if bracket := opening["bracket"]:
        return f"[/{bracket}]"
    if start := opening["start"]:
        ends = {"START_THINKING": "END_THINKING", "begin_of_thought": "end_of_thought", "think_start": "think_end"}
        return f"<|{ends[start]}|>"
    return "<channel|>"


def fix_date(template: Any) -> str | None:
    """The template with a day of ours in place of today's; None where it asks for none."""
    found = template.get("default") if isinstance(template, Mapping) else template
    return f"{_DATE_MACRO}{found}" if found and "strftime_now" in found else None


# ---- templates in files, before anything slow -----------------------------------------------------------------------


def check_template(folder: Path, key: str = "base.model") -> None:
    """Try the chat template of a model's folder without its tokenizer; raises InputError where it cannot write a question.

    A folder without a template is fine: its prompts are plain text.
    """
    if (found := load_renderer(folder, key)) is not None:
        learn_in_time(*found)


def load_renderer(folder: Path, key: str = "base.model") -> tuple[Render, str] | None:
    """What writes the chats of a model's folder, without its tokenizer, and its name; None where it has no template."""
    file, template, words = _read_template(folder, key)
    if not template:
        return None
    name = f"{key}: the chat template in {file}"
    return make_renderer(template, words, name), name


def _read_template(folder: Path, key: str) -> tuple[Path, str, dict[str, str]]:
    """The file that holds the template, the template (empty = none), and the special tokens by name."""
    settings: dict[str, object] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if file.is_file():
            with suppress(OSError, ValueError):  # loading the tokenizer has a message for a broken file
                settings |= json.loads(file.read_text(encoding="utf-8"))
    words = {
        name: value["content"] if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name.endswith("_token") and (isinstance(value, str) or isinstance(value, Mapping) and "content" in value)
    }
    file, found = folder / "tokenizer_config.json", settings.get("chat_template")
    alone, more = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if alone.is_file():
        return alone, alone.read_text(encoding="utf-8"), words
    if more:
        file, found = more[0].parent, {path.stem: "" for path in more}
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, Mapping)}
    if isinstance(found, Mapping):
        if "default" not in found:
            raise InputError(
                f"{key}: {file} has chat templates named {', '.join(map(str, found))}, but none named default; name the one "
                "to use `default`"
            )
        found = found["default"]
    return file, str(found or ""), words


def make_renderer(template: str, words: Mapping[str, str], name: str) -> Render:
    """What transformers makes of a template, by jinja2 alone: transformers takes seconds to import."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what is trained; it changes nothing of what is written."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def dump(x: object, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = dump
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _DATE.strftime
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InputError(f"{name}: cannot be read: {_shorten(error)}") from None
    return lambda messages, **options: str(compiled.render(messages=messages, **words, **OPTIONS, **options))
