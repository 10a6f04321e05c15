"""`python -m agentserve` and the `agentserve` command."""

from __future__ import annotations

import sys

from agentserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
