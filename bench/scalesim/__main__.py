"""Entry point of `python -m bench.scalesim`."""

import sys

from bench.scalesim.command import main

if __name__ == "__main__":
    sys.exit(main())
