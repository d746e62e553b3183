"""`medlora chat` over a pipe: answers of the active stage, letters of a pasted question, wrong uses."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from medlora.cli.using.chat import main
from medlora.data.rows.pasted import read_pasted
from medlora.errors import InputError
from medlora.records import RecordError
from medlora.runs.files import write_yaml

QUESTION = "/mcq\n인슐린 은 어디 에서 나온다?\nA. 췌장\nB. 해열\nC. 인슐린\n\n"


@pytest.fixture(scope="module")
def run(bases: dict[str, str], data: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with its config, and without its last phase in another folder."""
    from tests.support.tiny_run import configure

    folder = tmp_path_factory.mktemp("chat") / "run"
    shutil.copytree(finished, folder)
    write_yaml(folder / "config.yaml", configure(bases["gemma"], data).model_dump(mode="json"))
    return folder


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *argv: str) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main([*argv, "--max-tokens", "6"]) == 0
    done: Any = capsys.readouterr()
    return done.out, done.err


def write_alone(run: Path, stage: str) -> str:
    """What a stage writes about aspirin where its adapters are the only ones that were ever loaded."""
    from medlora.answering.generation import generate
    from medlora.config.loading.files import load
    from medlora.evaluation.stages import find_trained
    from medlora.model.base import load_base
    from medlora.model.chain import load_chain
    from medlora.model.tokenizer import load_stage_tokenizer
    from medlora.prompts import Example
    from medlora.runs.folders import RunFolder
    from medlora.tokens.encode import encode_prompts

    config = load(run / "config.yaml")
    chain = find_trained(RunFolder(run), config)[stage]
    tokenizer = load_stage_tokenizer(config.base, chain)
    model: Any = load_base(config.base, tokenizer)
    model = load_chain(model, [(link.name, Path(link.folder)) for link in chain]) if chain else model
    (made,) = generate(model, tokenizer, encode_prompts(tokenizer, [Example("text about aspirin", "")]), 6)
    return made.text


def test_stages_answer_and_weigh_letters(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"text about aspirin\n/stage base\ntext about aspirin\n{QUESTION}/stage 02\n{QUESTION}/quit\nnever\n"
    out, err = talk(monkeypatch, capsys, asked, f"{run}:02")
    assert "stage 02 of base, 00, 01, 02" in err and "stage base" in err and "never" not in out
    letters = re.findall(r"^([* ]) ([A-C]) +([\d.]+)%", out, flags=re.M)
    assert [letter for _, letter, _ in letters] == list("ABC") * 2
    for part in (letters[:3], letters[3:]):
        assert sum(float(share) for *_, share in part) == pytest.approx(100, abs=0.2)
        assert [mark for mark, *_ in part].count("*") == 1
    assert letters[:3] != letters[3:]  # the adapters are really on
    assert out.startswith("".join(f"{write_alone(run, stage)}\n" for stage in ("02", "base")))


def test_what_is_streamed_is_what_the_evaluation_generates(
    run: Path, bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medlora.answering.generation import generate
    from medlora.config.model import BaseModelConfig
    from medlora.model.base import load_base
    from medlora.model.tokenizer import load_tokenizer
    from medlora.prompts import Example
    from medlora.tokens.encode import encode_prompts

    out, _ = talk(monkeypatch, capsys, "text about insulin\n", bases["llama"])
    base = BaseModelConfig(model=bases["llama"])
    tokenizer = load_tokenizer(base)
    prompts = encode_prompts(tokenizer, [Example("text about insulin", "")])
    (made,) = generate(load_base(base, tokenizer), tokenizer, prompts, 6)
    assert out.rstrip("\n") == made.text.rstrip("\n")


def test_wrong_lines_are_explained_and_the_talk_goes_on(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = talk(
        monkeypatch, capsys, "/stage 07\n/mcq\nno options here\n\n/hello\n\ntext about insulin\n", bases["llama"]
    )
    assert "/stage 07: there is no such stage; there are base" in err
    assert "/mcq: no line begins options" in err and "/hello: no such command" in err and out.strip()


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ("{run}:07", "07 is no stage of it; there are base, 00, 01, 02"),
        ("{empty}:02", "is no run; write RUN:STAGE"),
        ("{empty}", "is a folder without config.json"),
        ("/absent/model", "there is no folder /absent/model"),
    ],
)
def test_wrong_uses_are_refused(who: str, message: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        main([who.format(run=run, empty=tmp_path)])
    with pytest.raises(InputError, match="must be 1 or more"):
        main(["miniature", "--max-tokens", "0"])


def test_a_stage_that_is_not_finished_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "phases" / "02")
    with pytest.raises(InputError, match="02 is not finished; train it first"):
        main([f"{tmp_path / 'run'}:02"])


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("무엇?\nA. 하나\nB. 둘", ("하나", "둘")),
        ("무엇?\n조건 1: 있다\n① 하나\n② 둘\n③ 셋", ("하나", "둘", "셋")),
        ("Q\n1) one\n2) two", ("one", "two")),
        ("Q\n가. 하나\n나. 둘", ("하나", "둘")),
    ],
)
def test_a_pasted_question_is_taken_apart(text: str, options: tuple[str, ...]) -> None:
    record = read_pasted(text)
    assert record.options == options and record.question == text[: text.index(text.splitlines()[-len(options)]) - 1]


@pytest.mark.parametrize("text", ["", "just text", "A. only\nB. options", "Q\nA. one", "Q\nB. one\nC. two"])
def test_what_is_no_question_is_refused(text: str) -> None:
    with pytest.raises(RecordError):
        read_pasted(text)
