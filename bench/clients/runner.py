"""Runs one client: a scratch home, a scratch directory, the daemon with its script, and a look at what came out."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agentserve.cli.client_settings import Endpoint, settings_for
from bench.clients.catalog import ANSWER, FILE, TASK, WORD, Client, fill
from bench.clients.fixtures import HEADERS, Fixture, FixtureRequest, Scrubber
from bench.clients.recorder import Exchange, Recorder

MODEL = "qwen3-8b"
_WINDOW = 131072
"""The largest of these agents compact their history at once in a smaller one."""
_START_TIMEOUT_S = 120.0


class ClientError(Exception):
    """A client or the daemon could not be started."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run has shown."""

    client: Client
    version: str
    exit_code: int | None
    """None: it was ended after the time limit."""
    output: str
    exchanges: list[Exchange]
    problems: list[str]


async def run_client(client: Client, folder: Path, scratch: Path, *, timeout_s: float) -> Outcome:
    """Raises ClientError when nothing can be run.

    Args:
        client: which one.
        folder: where it was installed.
        scratch: an empty directory; home and work directory are made in it.
        timeout_s: how long the client may take.
    """
    program = folder / client.program
    if not program.exists():
        raise ClientError(f"{client.name} is not installed: python -m bench.clients install {client.name}")
    home, work = scratch / "home", scratch / "work"
    home.mkdir(parents=True)
    work.mkdir()
    values = {"work": str(work), "home": str(home), "model": MODEL, "task": TASK}
    script = scratch / "script.jsonl"
    script.write_text("".join(json.dumps(line) + "\n" for line in client.script(values)), encoding="utf-8")
    async with _daemon(script, scratch) as (target, window):
        recorder = Recorder(target)
        async with recorder.running():
            endpoint = Endpoint(url=recorder.url, model=MODEL, window=window)
            env = _prepare(client, endpoint, home, folder)
            values["url"] = recorder.url
            _, version = await _run(program, client.version, env, work, timeout_s)
            for command in client.setup:
                await _run(program, [fill(part, values) for part in command], env, work, timeout_s)
            arguments = [fill(part, values) for part in client.arguments]
            exit_code, output = await _run(program, arguments, env, work, timeout_s)
        exchanges = recorder.exchanges
    problems = _check(client, exit_code, output, work, exchanges)
    return Outcome(
        client, version.strip().splitlines()[-1] if version.strip() else "?", exit_code, output, exchanges, problems
    )


def _prepare(client: Client, endpoint: Endpoint, home: Path, folder: Path) -> dict[str, str]:
    """Writes the files that `agentserve env` prints and returns the whole environment of the client."""
    settings = settings_for(client.settings, endpoint)
    for file in settings.files:
        path = home / file.path.removeprefix("~/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.content, encoding="utf-8")
    for name, content in client.files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    node = folder / "node_modules" / "node" / "bin"
    search = [str(node)] if node.is_dir() else []
    return {
        "HOME": str(home),
        "PATH": os.pathsep.join([*search, "/usr/local/bin", "/usr/bin", "/bin"]),
        "TERM": "dumb",
        "LANG": "C.UTF-8",
        "NO_COLOR": "1",
        **settings.env,
        **client.env,
    }


def _check(client: Client, exit_code: int | None, output: str, work: Path, exchanges: list[Exchange]) -> list[str]:
    problems = []
    if exit_code is None:
        problems.append("it did not end in time")
    elif exit_code != 0:
        problems.append(f"exit code {exit_code}")
    file = work / FILE
    if not file.is_file() or file.read_text(encoding="utf-8").strip() != WORD:
        problems.append(f"{FILE} does not hold the word that the model wrote")
    if ANSWER not in " ".join(output.split()):
        problems.append("the answer is not in its output")
    asked = [exchange for exchange in exchanges if exchange.method == "POST" and WORD.encode() in exchange.body]
    if client.read is not None and not any(_has_result(exchange.body) for exchange in asked):
        problems.append("no request brought the result of a tool")
    for exchange in exchanges:
        if exchange.status >= 400:
            reply = exchange.reply[:300].decode(errors="replace")
            problems.append(f"{exchange.method} {exchange.path} was answered with {exchange.status}: {reply}")
    return problems


def _has_result(body: bytes) -> bool:
    return any(
        mark in body for mark in (b'"tool_result"', b'"role":"tool"', b'"role": "tool"', b"function_call_output")
    )


@asynccontextmanager
async def _daemon(script: Path, scratch: Path) -> AsyncIterator[tuple[str, int]]:
    """Starts `agentserve serve`; yields its address and its window."""
    log_path = scratch / "daemon.log"
    env = {name: value for name, value in os.environ.items() if not name.startswith("AGENTSERVE_")}
    env["XDG_CONFIG_HOME"] = str(scratch)
    command = ["-m", "agentserve", "serve", "--model", MODEL, "--max-model-len", str(_WINDOW), "--script", str(script)]
    command += ["--gpu", "h100", "--port", "0"]
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=log, stderr=log, env=env, start_new_session=True
        )
    try:
        url, window = await asyncio.wait_for(_wait_for(log_path, process), _START_TIMEOUT_S)
        yield url, window
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            await process.wait()


async def _wait_for(log_path: Path, process: asyncio.subprocess.Process) -> tuple[str, int]:
    while True:
        text = log_path.read_text(encoding="utf-8")
        url = re.search(r"listening on (http://\S+)", text)
        window = re.search(r"window of (\d+) tokens", text)
        if url and window:
            return url[1], int(window[1])
        if process.returncode is not None:
            raise ClientError(f"the daemon did not start:\n{text[-2000:]}")
        await asyncio.sleep(0.05)


async def _run(
    program: Path, arguments: list[str] | tuple[str, ...], env: Mapping[str, str], work: Path, timeout_s: float
) -> tuple[int | None, str]:
    """Exit code and output of a client; its whole process group is ended when time is up."""
    process = await asyncio.create_subprocess_exec(
        str(program),
        *arguments,
        cwd=work,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    output = bytearray()

    async def read() -> None:
        assert process.stdout is not None
        while chunk := await process.stdout.read(65536):
            output.extend(chunk)

    reading = asyncio.create_task(read())
    try:
        await asyncio.wait_for(process.wait(), timeout_s)
        code = process.returncode
    except TimeoutError:
        code = None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    await asyncio.wait([reading], timeout=5)
    reading.cancel()
    return code, output.decode("utf-8", "replace")


def to_fixture(outcome: Outcome, scratch: Path, folder: Path) -> Fixture:
    """What the client sent, ready to be kept."""
    client = outcome.client
    places = {str(scratch / "work"): "/workspace", str(scratch / "home"): "/home/user", str(folder): "/opt/clients"}
    places |= {str(folder.resolve()): "/opt/clients", str(scratch): "/scratch"}
    scrubber = Scrubber(places)
    requests = [
        FixtureRequest(
            exchange.method,
            exchange.path,
            {name.lower(): scrubber.text(value) for name, value in exchange.headers.items() if name.lower() in HEADERS},
            scrubber.value(json.loads(exchange.body)) if exchange.body else None,
            exchange.status,
        )
        for exchange in outcome.exchanges
    ]
    return Fixture(
        client.name, outcome.version, client.dialect, "recorded", client.script({"work": "/workspace"}), requests
    )
