"""What a chat template writes is found by rendering it; what is wrong with one is one message, before anything slow."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from medlora import turns
from medlora.config.loading.files import load_evaluate_config
from medlora.curriculum.checks import check_inputs
from medlora.errors import InputError
from medlora.evaluation.plan import check_evaluation
from medlora.turns import check_template, fix_date, learn, learn_in_time, make_renderer, render_in_time, write_prompt
from tests.support import ROOT
from tests.support.tiny_run import configure

WORDS = {"bos_token": "<s>", "eos_token": "</s>"}
TURN = "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
PLAIN = f"{{% for m in messages %}}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>\n{{% endif %}}"
PARTS = PLAIN.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
STRICT_PARTS = PLAIN.replace("{{ m.content }}", "{{ m.content[0]['text'] }}")
BOTH = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
)
BROKEN = {
    "raises": ("{{ raise_exception('only with tools') }}", "TemplateError: only with tools"),
    "syntax": ("{% for m in messages %}{{ m.role }}", "cannot be read: TemplateSyntaxError in line 1"),
    "undefined": ("{{ messages.none.more }}", "UndefinedError"),
    "drops": ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what the user asks"),
    "no default": ([{"name": "rag", "template": PLAIN}], "named rag, but none named default"),
}


def render_with(template: str) -> Any:
    return make_renderer(template, WORDS, "here")


@pytest.mark.parametrize(
    ("template", "parts"), [(PLAIN, False), (PARTS, True), (STRICT_PARTS, True), (BOTH, False)], ids=str
)
def test_the_question_is_in_the_prompt_as_text_or_as_parts(template: str, parts: bool) -> None:
    render = render_with(template)
    convention = learn(render, "here")
    assert convention.parts == parts and convention.end == "<|end|>\n"
    turns = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2 <b> & more")]
    assert write_prompt(render, convention, turns, "here") == (
        "<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2 <b> & more<|end|>\n<|assistant|>\n"
    )


def test_a_turn_that_is_left_out_or_changed_is_refused() -> None:
    last = "{{ messages[-1].content }}"
    with pytest.raises(InputError, match="here: it leaves out or changes a turn: 'Q1'"):
        write_prompt(
            render_with(last),
            learn(render_with(last), "here"),
            [("user", "Q1"), ("assistant", "A"), ("user", "Q2")],
            "here",
        )
    loud = PLAIN.replace("{{ m.content }}", "{{ m.content | replace('aspirin', 'X') }}")
    with pytest.raises(InputError, match=r"changes a turn: 'aspirin\?'"):
        write_prompt(render_with(loud), learn(render_with(loud), "here"), [("user", "aspirin?")], "here")


@pytest.mark.parametrize(
    ("opened", "whole"),
    [
        ("<think>\n", "<think>\n\n</think>\n\n"),
        ("<think>", "<think>\n\n</think>\n\n"),
        ("<think>\n\n", "<think>\n\n</think>\n\n"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("<seed:think>", "<seed:think>\n\n</seed:think>\n\n"),
        ("<thought>\n", "<thought>\n\n</thought>\n\n"),
        ("[THINK]", "[THINK][/THINK]"),
        ("<|START_THINKING|>", "<|START_THINKING|><|END_THINKING|>"),
        ("<|channel>thought\n", "<|channel>thought\n<channel|>"),
        ("", ""),
    ],
)
def test_reasoning_that_the_prompt_leaves_open_is_closed(opened: str, whole: str) -> None:
    template = PLAIN.replace("<|assistant|>\n{% endif", f"<|assistant|>\n{opened}{{% endif")
    render = render_with(template)
    prompt = write_prompt(render, learn(render, "here"), [("user", "What does <think> mean?")], "here")
    assert prompt.endswith(f"<|assistant|>\n{whole}")


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y|%Y-%m-%d') }}{% endif %}" + PLAIN
    fixed = fix_date(template)
    assert fixed is not None and fix_date(PLAIN) is None
    render = render_with(template)
    assert write_prompt(render, learn(render, "here"), [("user", "Q")], "here").startswith("26 Jul 2024|2024-07-26")
    # transformers renders it with a clock of its own, which the macro stands before.
    assert render_with(fixed)([{"role": "user", "content": "Q"}], add_generation_prompt=True).startswith(
        "26 Jul 2024|2024-07-26<|user|>"
    )


LOOPS_ON_LONG_TEXTS = (
    "{% set row = range(99999) %}{% if messages[0].content | length > 50 %}"
    "{% for a in row %}{% for b in row %}{% for c in row %}{% endfor %}{% endfor %}{% endfor %}{% endif %}"
)
"""Every short conversation is fine, and each loop is as short as the sandbox wants it."""


def in_another_thread(act: Callable[[], object]) -> object:
    """As in Ray's workers."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


@pytest.mark.parametrize("run", [lambda act: act(), in_another_thread], ids=["main", "worker"])
def test_a_template_that_loops_on_some_prompts_alone_is_ended(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LIMIT_S", 0.3)
    monkeypatch.setattr(turns, "_LOOK_S", 0.1)
    render = render_with(LOOPS_ON_LONG_TEXTS + PLAIN)
    convention = learn_in_time(render, "here")
    asked = ["short", "long " * 20]

    def write(limited: Any) -> list[str]:
        return [write_prompt(limited, convention, [("user", text)], "here") for text in asked]

    with pytest.raises(InputError, match="^here: writing one prompt did not end in 0.3 s"):
        run(lambda: render_in_time(render, "here", write))
    asked.pop()
    assert render_in_time(render, "here", write) == ["<|user|>\nshort<|end|>\n<|assistant|>\n"]


def test_many_renderings_may_take_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LIMIT_S", 1.0)
    monkeypatch.setattr(turns, "_LOOK_S", 0.1)

    def slow(*arguments: Any, **options: Any) -> str:
        time.sleep(0.05)
        return "written"

    assert render_in_time(slow, "here", lambda render: [render([]) for _ in range(30)]) == ["written"] * 30


def write_base(folder: Path, bases: dict[str, str], template: Any, in_config: bool = True) -> str:
    """The tiny Llama with that template, in its tokenizer's config or in a file of its own."""
    import shutil

    shutil.copytree(bases["llama"], folder)
    file = folder / "tokenizer_config.json"
    if in_config:
        settings = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**settings, "chat_template": template}), encoding="utf-8")
    else:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_one_message_before_anything_starts(
    name: str, bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    template, reason = BROKEN[name]
    base = write_base(tmp_path / "base", bases, template)
    config = configure(base, data)
    with pytest.raises(InputError) as caught:
        check_inputs(config)
    assert str(tmp_path / "base" / "tokenizer_config.json") in str(caught.value) and reason in str(caught.value)
    # Plain text alone needs no template.
    text = config.model_copy(update={"phases": config.phases[:1]})
    check_inputs(text)


def test_a_template_in_a_file_of_its_own_is_named(bases: dict[str, str], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", bases, BROKEN["syntax"][0], in_config=False)
    with pytest.raises(InputError, match="chat template in .*chat_template.jinja: cannot be read"):
        check_template(Path(base))
    check_template(Path(bases["llama"]))


def test_an_evaluation_with_a_broken_template_exits_with_2(bases: dict[str, str], data: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", bases, BROKEN["raises"][0])
    config = tmp_path / "evaluate.yaml"
    config.write_text(
        f"name: e\nbase: {{model: {base}}}\nstages: [{{name: plain}}]\n"
        f"evaluation: {{tests: [{{name: dev, source: {data / 'dev.jsonl'}}}], style: answer}}\n",
        encoding="utf-8",
    )
    job = ROOT / "jobs" / "evaluate_mcq.py"
    command = [sys.executable, str(job), "--config", str(config), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "only with tools" in done.stderr and "Traceback" not in done.stderr
    check_evaluation(load_evaluate_config(config, ["evaluation.style=kormedmcqa"]), force=False)
