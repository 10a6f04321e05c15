"""Installs and runs command-line agents against the daemon.

python -m bench.clients list
python -m bench.clients install claude codex
python -m bench.clients run claude --record tests/fixtures/clients
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from bench.clients.catalog import CLIENTS, Client, find
from bench.clients.fixtures import dump
from bench.clients.runner import ClientError, Outcome, run_client, to_fixture

DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "agentserve-clients"
_NODE = "node@22"
_INSIDE = "AGENTSERVE_LOOPBACK_ONLY"


def main() -> int:
    arguments = _parse()
    try:
        clients = find(arguments.clients)
    except KeyError as error:
        print(f"no client is called {error.args[0]!r}; there are {', '.join(CLIENTS)}", file=sys.stderr)
        return 2
    if arguments.verb == "list":
        for client in clients:
            print(f"{client.name:10} {client.registry:5} {' '.join(install_command(client, arguments.folder))}")
        return 0
    if arguments.verb == "install":
        return _install(clients, arguments.folder)
    if not arguments.any_network and _INSIDE not in os.environ:
        return _without_network()
    return asyncio.run(_run_all(clients, arguments))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.clients", description=__doc__)
    parser.add_argument("verb", choices=("list", "install", "run"))
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"{', '.join(CLIENTS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where clients are installed")
    parser.add_argument("--record", type=Path, help="write the requests of each run into this folder")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="for one client (default: 120)")
    parser.add_argument("--verbose", action="store_true", help="show what each client printed and sent")
    parser.add_argument(
        "--any-network",
        action="store_true",
        help="where `unshare` is missing or not allowed: rely on the clients' own settings to stay on loopback",
    )
    return parser.parse_args()


def install_command(client: Client, folder: Path) -> list[str]:
    if client.registry == "PyPI":
        return [str(folder / client.name / "bin" / "python"), "-m", "pip", "install", client.package]
    return ["npm", "install", "--prefix", str(folder), _NODE, client.package]


def _install(clients: list[Client], folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for client in clients:
        if client.registry == "PyPI":
            venv.create(folder / client.name, with_pip=True)
        commands = [install_command(client, folder)]
        if client.registry == "npm":
            # Programs for this machine are fetched by scripts that npm may have been told not to run.
            commands.append(["npm", "rebuild", "--prefix", str(folder), _NODE.partition("@")[0], client.package])
        for command in commands:
            print("+", " ".join(command), flush=True)
            subprocess.run(command, check=True)
    return 0


def _without_network() -> int:
    """Starts itself again in a network namespace whose only device is loopback."""
    unshare = shutil.which("unshare")
    if unshare is None:
        print("there is no unshare here; see --any-network", file=sys.stderr)
        return 2
    inner = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-m", "bench.clients", *sys.argv[1:]]
    # Its own process numbers, too: what a client leaves running behind itself ends with it.
    options = ["--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [unshare, *options, *([] if os.geteuid() == 0 else ["--map-root-user"]), *inner]
    return subprocess.run(command, check=False, env={**os.environ, _INSIDE: "1"}).returncode


async def _run_all(clients: list[Client], arguments: argparse.Namespace) -> int:
    failed = 0
    for client in clients:
        with tempfile.TemporaryDirectory(prefix="agentserve-run-", ignore_cleanup_errors=True) as scratch:
            try:
                outcome = await run_client(client, arguments.folder, Path(scratch), timeout_s=arguments.timeout)
            except ClientError as error:
                print(f"{client.name:10} SKIPPED  {error}")
                continue
            failed += bool(outcome.problems)
            _report(outcome, arguments.verbose)
            if arguments.record is not None and not outcome.problems:
                arguments.record.mkdir(parents=True, exist_ok=True)
                text = dump(to_fixture(outcome, Path(scratch), arguments.folder))
                (arguments.record / f"{client.name}.jsonl").write_text(text, encoding="utf-8")
    return 1 if failed else 0


def _report(outcome: Outcome, verbose: bool) -> None:
    verdict = "FAILED" if outcome.problems else "passed"
    posts = [exchange.path for exchange in outcome.exchanges]
    print(f"{outcome.client.name:10} {verdict}  {outcome.version}  {len(posts)} requests: {', '.join(posts)}")
    for problem in outcome.problems:
        print(f"           - {problem}")
    if verbose:
        print(outcome.output[-4000:])


if __name__ == "__main__":
    sys.exit(main())
