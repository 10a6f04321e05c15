"""Runs one part in this process: `python -m bench.gpu.part NAME --scratch DIR ...`. `bench.gpu.check` starts it."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.record import PartRun


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 if the part failed; then its result has the error."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.part", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    run = PartRun(
        name=arguments.name,
        scratch=arguments.scratch,
        deadline_s=time.monotonic() + arguments.limit_s,
        model=arguments.model,
        load_format=arguments.load_format,
        shared=arguments.scratch.parent,
        dry_run=arguments.dry_run,
    )
    try:
        importlib.import_module(f"bench.gpu.{arguments.name}").run(run)
    except Exception as error:  # noqa: BLE001 - whatever it is, the next part must run and the reader must see it
        traceback.print_exc()
        run.put("error", f"{type(error).__name__}: {error}")
        run.put("traceback", traceback.format_exc().splitlines()[-12:])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
