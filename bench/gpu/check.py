"""`scripts/gpu_check OUT_DIR`: everything that can be learned about a GPU in nine minutes, in one command.

Each part runs in a process of its own, with its own time limit, in the order of its value. `gpu_check.json` is written
again after every part, so that an end at any time leaves what was known by then; beside it lie a log and pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from agentserve.errors import AgentServeError
from bench.gpu import surroundings
from bench.gpu.plan import BUDGET_S, MAX_FILES, PARTS, Part, choose, time_for
from bench.gpu.record import write_json
from bench.gpu.smi import smi
from bench.gpu.targets import evaluate, render

_GRACE_S = 6.0
"""Between being asked to stop and being stopped."""
_MODEL = "qwen2.5-7b"
_FORMAT = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if every part ran to its end, 1 if one did not, 2 for wrong arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    started_s = time.monotonic()
    try:
        parts = choose(arguments.only or ())
    except AgentServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not (arguments.dry_run or surroundings.has_gpu()):
        print("error: there is no GPU here; --dry-run walks through the parts without one", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        folders = surroundings.make_importable(scratch)
        wheels = surroundings.unpack_wheels(surroundings.ROOT / ".whl", scratch / "site")
        try:
            model, load_format = surroundings.prepare_model(arguments.model, scratch, arguments.dry_run)
        except (AgentServeError, KeyError) as error:
            print(f"error: --model: {error}", file=sys.stderr)
            return 2
        check = Check(
            out=arguments.out.resolve(),
            scratch=scratch,
            environ=surroundings.environment(folders, uuid.uuid4().hex),
            options=("--model", model, "--load-format", load_format, *(["--dry-run"] if arguments.dry_run else [])),
            deadline_s=started_s + arguments.budget_s,
        )
        check.document["conditions"] = {
            **surroundings.conditions(words, arguments.commit),
            **wheels,
            "missing": surroundings.missing(sorted({module for part in PARTS for module in part.needs})),
            "model": arguments.model,
            "weights": "random" if load_format == "dummy" else "real",
            "dry_run": arguments.dry_run,
            "budget_s": arguments.budget_s,
        }
        return check.run(parts)


@dataclass(slots=True)
class Check:
    """A check that runs."""

    out: Path
    scratch: Path
    environ: dict[str, str]
    options: tuple[str, ...]
    deadline_s: float
    document: dict[str, Any] = field(default_factory=lambda: {"format": _FORMAT, "conditions": {}, "parts": {}})

    def run(self, parts: Sequence[Part]) -> int:
        """Runs the parts and prints the table of targets; returns the exit code."""
        started_s = time.monotonic()
        with (self.out / "gpu_check.log").open("w", encoding="utf-8") as log:
            self._announce(parts)
            for index, part in enumerate(parts):
                self.document["parts"][part.name] = self._part(parts, index, log)
                self._save(started_s)
            results = {name: entry["result"] for name, entry in self.document["parts"].items()}
            rows = evaluate(results)
            if self.document["conditions"]["dry_run"]:
                # Numbers of a tiny model on a CPU: they show that they are found, no more.
                rows = [{**row, "held": None} for row in rows]
            self.document["targets"] = rows
            self._save(started_s)
            table = render(rows)
            log.write(table + "\n")
        print(table)
        statuses = {name: entry["status"] for name, entry in self.document["parts"].items()}
        print("\n" + ", ".join(f"{name}: {status}" for name, status in statuses.items()))
        print(f"written to {self.out}: {', '.join(sorted(path.name for path in self.out.iterdir()))}")
        return int(any(status != "ok" for status in statuses.values()))

    def _announce(self, parts: Sequence[Part]) -> None:
        missing = self.document["conditions"]["missing"]
        print(f"missing here: {', '.join(missing)}" if missing else "all that the parts import is here")
        for part in parts:
            print(f"   {part.name:10} at most {part.limit_s:3.0f} s, {part.reserve_s:3.0f} s kept for it: {part.what}")

    def _save(self, started_s: float) -> None:
        self.document["seconds"] = round(time.monotonic() - started_s, 1)
        write_json(self.out / "gpu_check.json", self.document)

    def _part(self, parts: Sequence[Part], index: int, log: IO[str]) -> dict[str, Any]:
        part = parts[index]
        entry: dict[str, Any] = {"what": part.what, "status": "skipped", "result": {}}
        limit_s = time_for(parts, index, self.deadline_s - time.monotonic())
        missing = surroundings.missing(("torch", *part.needs))
        if missing or limit_s <= 0.0:
            entry["why"] = f"these modules are missing: {', '.join(missing)}" if missing else "no time was left"
            print(f"== {part.name}: skipped, {entry['why']}", flush=True)
            return entry
        print(f"== {part.name}, at most {limit_s:.0f} s: {part.what}", flush=True)
        folder = self.scratch / part.name
        folder.mkdir()
        entry |= {"limit_s": round(limit_s, 1), "smi_before": smi()}
        started_s = time.monotonic()
        code, entry["num_leftovers"] = self._execute(part, folder, limit_s, log)
        entry["seconds"] = round(time.monotonic() - started_s, 1)
        entry["smi_after"] = smi()
        entry["status"] = {None: "stopped", 0: "ok"}.get(code, "failed")
        entry["exit_code"] = code
        with contextlib.suppress(FileNotFoundError):  # it ended before it had anything to say
            entry["result"] = json.loads(self._without_places((folder / "result.json").read_text(encoding="utf-8")))
        self._collect(folder)
        print(f"== {part.name}: {entry['status']} after {entry['seconds']} s", flush=True)
        return entry

    def _execute(self, part: Part, folder: Path, limit_s: float, log: IO[str]) -> tuple[int | None, int]:
        """Runs it; returns its exit code, None if it had to be stopped, and how many processes it left behind."""
        command = [sys.executable, "-m", "bench.gpu.part", part.name, "--scratch", str(folder)]
        command += ["--limit-s", f"{limit_s:.1f}", *self.options]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=_copy, args=(process.stdout, log, self._without_places), daemon=True)
        reader.start()
        code: int | None = None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            # As from a keyboard: then it still ends what it has started.
            _signal_group(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
            # They would keep the pipe open that the log is read from, and the GPU's memory.
            num_leftovers = surroundings.stop_leftovers(self.environ[surroundings.MARKER])
        reader.join(_GRACE_S)
        return code, num_leftovers

    def _without_places(self, text: str) -> str:
        """Where things lie on this machine says nothing to others."""
        return text.replace(str(self.scratch), "SCRATCH").replace(str(surroundings.ROOT), "ROOT")

    def _collect(self, folder: Path) -> None:
        """Moves pictures to the results, as long as there may be more files."""
        for picture in sorted(folder.glob("*.png")):
            if len(list(self.out.iterdir())) >= MAX_FILES:
                return
            shutil.move(picture, self.out / picture.name)


def _copy(source: IO[str] | None, log: IO[str], clean: Callable[[str], str]) -> None:
    assert source is not None
    with source:
        for line in source:
            print("   " + line, end="", flush=True)
            log.write(clean(line))
            log.flush()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(group, number)


def _parser() -> argparse.ArgumentParser:
    names = "; ".join(f"{part.name}: {part.what}" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, epilog=f"Parts, in their order. {names}.", allow_abbrev=False
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="gets gpu_check.json, gpu_check.log and pictures")
    parser.add_argument("--dry-run", action="store_true", help="walk through all parts on a CPU with a tiny model")
    parser.add_argument("--only", action="append", metavar="PART", help="this part; may be given several times")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds in all (default: %(default)g)")
    parser.add_argument("--model", default=_MODEL, help="alias of a model; its shape with random weights unless its "
                        "weights are here (default: %(default)s)")  # fmt: skip
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    return parser


if __name__ == "__main__":
    sys.exit(main())
