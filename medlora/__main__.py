"""`python -m medlora` is the command `medlora`."""

import sys

from medlora.cli.main import main

sys.exit(main())
