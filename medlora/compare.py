"""`python -m medlora.compare` is `medlora compare`."""

import sys

from medlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
