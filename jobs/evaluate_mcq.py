"""`python jobs/evaluate_mcq.py` is `medlora evaluate`: the door for `ray job submit`."""

import sys

from medlora.cli.evaluate import main
from medlora.endings import run_job

if __name__ == "__main__":
    sys.exit(run_job(main))
