"""`python jobs/curriculum.py` is `medlora train`: the door for `ray job submit`."""

import sys

from medlora.cli.train import main
from medlora.endings import run_job

if __name__ == "__main__":
    sys.exit(run_job(main))
