"""Load driver for any OpenAI-compatible endpoint: load, compare, report, figures, fidelity. See bench/PEERS.md."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in {None, ""}:
    # Run as a file: then the path starts with this directory, where `load` would not be `bench.load`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.load.cli import main

if __name__ == "__main__":
    sys.exit(main())
