"""Trials that train nothing: what a search on Ray does with them is all that is tested."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any


def fake_trial(trial: dict[str, Any]) -> None:
    """Scores `steps` times, better the higher `x`; what `does` says happens at the first try, `always` at every one.

    `beside` is how many trials must have begun before it goes on; after a minute it goes on alone.
    """
    from ray import tune

    tries = Path(trial["folder"]) / f"{trial['id']}.tries"
    with tries.open("a") as file:
        file.write(f"{os.getpid()} {trial['x']}\n")
    first = len(tries.read_text().splitlines()) == 1
    began = time.time()
    while len(list(tries.parent.glob("*.tries"))) < trial.get("beside", 1) and time.time() < began + 60:
        time.sleep(0.05)
    for step in range(1, trial["steps"] + 1):
        time.sleep(trial.get("sleep_s", 0.05))
        if step == 2 and (first or trial.get("always")):
            if trial.get("does") == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if trial.get("does") == "raise":
                raise RuntimeError("a bug of ours")
            if trial.get("does") == "diverge":
                tune.report({"ended": "failed", "why": "the loss is nan"})
                return
        tune.report({"step": step, "score": trial["x"] * (1 - 0.5**step), "last": step == trial["steps"]})
    ran = {"began": began, "ended": time.time(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    tries.with_suffix(".ran").write_text(json.dumps(ran))
    tune.report({"ended": "finished", "why": ""})
