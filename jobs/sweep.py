"""`python jobs/sweep.py` is `medlora sweep`: the door for `ray job submit`."""

import sys

from medlora.cli.sweep import main
from medlora.endings import run_job

if __name__ == "__main__":
    sys.exit(run_job(main))
