"""Chat templates of strangers, tried in a process of their own before a model is loaded.

transformers renders them in jinja's sandbox, which keeps them from files and code but not from looping for hours or
taking all memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache

from medlora.errors import InputError

LIMIT_S = 2
"""Seconds of computing; a template takes milliseconds, and jinja itself a quarter of a second."""


_MEMORY_BYTES = 2 * 2**30


_TRIAL = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY_BYTES}, {_MEMORY_BYTES}))
resource.setrlimit(resource.RLIMIT_CPU, ({LIMIT_S}, {LIMIT_S + 1}))
import jinja2, jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
class Generation(jinja2.ext.Extension):
    tags = {{"generation"}}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("show"), [], [], body).set_lineno(line)
    def show(self, caller):
        return caller()
def refuse(message):
    raise jinja2.exceptions.TemplateError(message)
kinds = [Generation, "jinja2.ext.loopcontrols"]
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=kinds)
environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False)
environment.globals["raise_exception"] = refuse
environment.globals["strftime_now"] = lambda form: "2026-01-01"
try:
    template = environment.from_string(json.load(sys.stdin))
except (jinja2.exceptions.TemplateSyntaxError, RecursionError):
    sys.exit()  # `turns.check_template` says it, where a prompt needs the template
user, assistant = ({{"role": role, "content": role + " text"}} for role in ("user", "assistant"))
for turns in ([user], [user, assistant, user]):
    try:
        template.render(messages=turns, add_generation_prompt=True, enable_thinking=False, bos_token="<s>", eos_token="</s>")
    except (OverflowError, MemoryError, RecursionError) as error:
        print("limit", str(error) or "out of memory")
        sys.exit()
    except Exception:
        pass  # what it refuses by itself is reported where it is used, with the text that it was given
"""


@lru_cache(maxsize=64)
def _try_template(template: str) -> str:
    """What a template exceeds, as "limit ..."; "" where it exceeds nothing."""
    command = [sys.executable, "-I", "-c", _TRIAL]
    try:
        done = subprocess.run(
            command, input=json.dumps(template), capture_output=True, text=True, timeout=15 * LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "limit time"
    if done.returncode < 0:
        return "limit time"
    if done.returncode and "MemoryError" in done.stderr:
        return "limit out of memory"
    return done.stdout.strip()


def check_template(where: str, template: str) -> None:
    """Raise InputError for a chat template that does not end within seconds, or takes too much memory, on a short conversation.

    One that is no jinja is refused by `turns.check_template`, where a prompt needs it: plain text does not.
    """
    kind, _, reason = _try_template(template).partition(" ")
    if kind == "limit":
        what = f"did not end in {LIMIT_S} s" if reason == "time" else f"failed ({reason.splitlines()[0]})"
        raise InputError(
            f"{where}: {what} on a conversation of one line; a template of the model's makers ends at once"
        )
