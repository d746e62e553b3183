"""How jobs end: exit codes, the one line, checkpoints within the grace period, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from medlora.config.placement import Placement
from medlora.runs.folders import RunFolder, describe_progress
from medlora.runs.manifests import commit
from medlora.sweep.ledger import Ledger
from tests.support import ROOT

START = "import os, sys, time, threading\nfrom pathlib import Path\nfrom medlora import endings\nfrom medlora.errors import InputError\n"
END = "\nsys.exit(endings.run_job(work))\n"


def start(work: str, **env: str) -> subprocess.Popen[str]:
    """A job in a process of its own, once it has printed `ready`; `work` is the body of what it does."""
    code = START + "def work():\n" + textwrap.indent(textwrap.dedent(work), "    ") + END
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if "ready" in work:
        assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str], *signals: int) -> tuple[int, str, float]:
    """Exit code, stderr, and the seconds that it took, after these signals, half a second apart."""
    began = time.monotonic()
    for i, each in enumerate(signals):
        time.sleep(0.5 * (i > 0))
        process.send_signal(each)
    _, err = process.communicate(timeout=30)
    return process.returncode, err, time.monotonic() - began


WAIT = "print('ready', flush=True)\ntime.sleep(60)"


@pytest.mark.parametrize(
    ("signum", "code", "said"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_a_signal_ends_a_job_with_one_line_and_its_code(signum: int, code: int, said: str, tmp_path: Path) -> None:
    saved = f"endings.describe_progress(lambda: '7 answers are saved', Path({str(tmp_path / 'log')!r}))\n"
    returned, err, took = end(start(saved + WAIT), signum)
    assert returned == code and took < 5
    assert err.startswith("medlora: ended by ") and said in err and err.endswith("; 7 answers are saved\n")
    assert err.count("\n") == 1


def test_before_anything_is_written_the_line_says_so() -> None:
    code, err, _ = end(start(WAIT), signal.SIGINT)
    assert code == 130 and err == "medlora: ended by Ctrl-C; nothing was written; the same command starts again\n"


def test_an_input_error_is_code_2_and_any_other_a_traceback_and_code_1() -> None:
    assert end(start("raise InputError('phases.00: wrong')"))[:2] == (2, "medlora: phases.00: wrong\n")
    code, err, _ = end(start("raise ValueError('ours')"))
    assert code == 1 and "Traceback" in err
    assert end(start("return 0"))[:2] == (0, "")


@pytest.mark.parametrize(
    "work",
    [
        # Every way in which a main thread may miss the interrupt, and what other libraries do to handlers.
        WAIT.replace("time.sleep(60)", "while True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass"),
        WAIT.replace("time.sleep(60)", "try: time.sleep(60)\nfinally: time.sleep(60)"),
        WAIT.replace("time.sleep(60)", "import ctypes; ctypes.CDLL(None).sleep(60)"),
        "import signal\nfor s in (2, 15): signal.signal(s, lambda *_: sys.exit(0))\n" + WAIT,
        "import faulthandler\nfor s in (2, 15): faulthandler.register(s)\n" + WAIT,
    ],
)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_job_ends_in_time_whatever_its_main_thread_does(work: str, signum: int) -> None:
    code, err, took = end(start(work), signum)
    assert code == 128 + signum and took < 5 and err.count("\n") == 1, err


def test_what_threads_and_children_write_while_they_are_cut_off_goes_into_the_log(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.touch()
    work = f"""
    import subprocess
    endings.describe_progress(lambda: 'saved', Path({str(log)!r}))
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])
    def helper():
        while not endings.is_ending(): time.sleep(0.01)
        time.sleep(0.3)
        raise RuntimeError('cut off')
    threading.Thread(target=helper).start()
    Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
    print('ready', flush=True)
    try: time.sleep(60)
    finally: time.sleep(1)
    """
    process = start(work)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    code, err, _ = end(process, signal.SIGTERM)
    assert code == 143 and err == "medlora: ended by SIGTERM; saved\n"
    assert "RuntimeError: cut off" in log.read_text()
    psutil.wait_procs([child], timeout=5)  # a kill takes the kernel a moment
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


SAVING = """
def ask(): threading.Timer({needs}, lambda: (Path({file!r}).write_text('saved'), saved.set())).start()
with endings.saving(ask, {grace}) as saved:
    saved.clear()
    print('ready', flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("signals", "needs", "grace", "env", "saves", "least", "most"),
    [
        ((signal.SIGTERM,), 1.0, 10.0, {}, True, 1.0, 3.0),
        ((signal.SIGTERM,), 30.0, 1.0, {}, False, 1.0, 3.0),
        ((signal.SIGINT,), 1.0, 10.0, {}, False, 0.0, 1.0),
        ((signal.SIGTERM, signal.SIGINT), 5.0, 30.0, {}, False, 0.5, 2.5),
        # `ray job stop` kills after 3 s; the line has to be there before.
        ((signal.SIGTERM,), 30.0, 30.0, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, False, 1.0, 3.0),
    ],
)
def test_sigterm_waits_for_a_checkpoint_as_long_as_the_grace_period(
    signals: tuple[int, ...],
    needs: float,
    grace: float,
    env: dict[str, str],
    saves: bool,
    least: float,
    most: float,
    tmp_path: Path,
) -> None:
    file = tmp_path / "checkpoint"
    process = start(SAVING.format(needs=needs, grace=grace, file=str(file)), **env)
    code, err, took = end(process, *signals)
    assert code == 128 + signals[0] and err.count("\n") == 1
    assert file.exists() == saves and least <= took < most


def test_nothing_to_lose_is_not_waited_for() -> None:
    code, _, took = end(
        start("with endings.saving(lambda: None, 30):\n    print('ready', flush=True)\n    time.sleep(60)"),
        signal.SIGTERM,
    )
    assert code == 143 and took < 2


def test_a_closed_terminal_does_not_end_what_nohup_started() -> None:
    code = START + "def work():\n    print('ready', flush=True)\n    time.sleep(2)\n    return 0" + END
    process = subprocess.Popen(["nohup", sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 0


def test_outside_a_job_nothing_is_taken_and_nothing_ends() -> None:
    from medlora import endings

    with endings.saving(lambda: None, 1.0):
        endings.check()
    endings.describe_progress(lambda: "", Path("log"))
    endings.fail("nobody")
    assert not endings.is_ending()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_what_a_run_has_saved_is_said(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    names = ["00", "01"]
    assert describe_progress(run, names) == "no phase is finished; the same command resumes phase 00"
    run.phase("00").root.mkdir(parents=True)
    commit(run.phase("00").root, {})
    for segment, step in (("full", 90), ("normal", 20), ("normal", 100)):
        folder = run.phase("01").checkpoints / segment / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if step < 100:  # the last one was cut off before its manifest
            commit(folder, {})
    assert describe_progress(run, names) == "finished: 00; the same command resumes phase 01 from step 20"
    commit(run.phase("01").root, {})
    assert describe_progress(run, names).startswith("finished: 00, 01; the same command scores")


def test_what_a_sweep_has_saved_is_said(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trials.jsonl")
    for _ in range(3):
        ledger.begin({})
    ledger.end("000", "finished")
    assert ledger.describe_progress() == "1 of 3 trials are over; the same command resumes the others"


def test_grace_is_in_no_dump_unless_it_is_set() -> None:
    assert "grace_s" not in Placement().model_dump(mode="json")
    assert Placement.model_validate({"grace_s": 5}).model_dump(mode="json")["grace_s"] == 5.0
