"""Starts a daemon, lets three agents work, prints a table, writes pictures."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

from openai import AsyncOpenAI
from rich.console import Console

from agentserve import __version__
from agentserve.cli.machine import commit, describe_machine
from bench.demo.agents import TASKS, Agent, TurnResult
from bench.demo.report import plot_timeline, plot_turns, print_table, summary
from bench.demo.tools import Tools

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the daemon running and say how to talk to it")
    parser.add_argument("--turns", type=int, default=5, help="turns of each agent")
    parser.add_argument("--max-tokens", type=int, default=48, help="output tokens of a turn at most")
    parser.add_argument("--port", type=int, default=0, help="the daemon's port; 0 takes a free one")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "demo", help="where to write")
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a pipe has no width; the table needs this much
    arguments.out.mkdir(parents=True, exist_ok=True)
    log_path = arguments.out / "daemon.log"
    console.print("Starting the daemon: [bold]agentserve serve[/] (its embedded default: SmolLM2-135M on the CPU)")
    with log_path.open("wb") as log:
        command = [sys.executable, "-m", "agentserve", "serve", "--port", str(arguments.port)]
        daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT)
    keep = False
    try:
        base_url = wait_until_ready(daemon, log_path)
        results = asyncio.run(drive(base_url, arguments, console))
        write_report(base_url, results, arguments.out, console)
        keep = arguments.keep
    finally:
        if not keep:
            daemon.terminate()
            daemon.wait(timeout=60)
    if keep:
        print_how_to_talk(base_url, daemon.pid, console)
    return 0


def wait_until_ready(daemon: subprocess.Popen[bytes], log_path: Path) -> str:
    """Waits for the line with the address in the daemon's log. Raises SystemExit if the daemon gives up."""
    while True:
        log = log_path.read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"listening on (http://\S+)", log):
            return match[1]
        try:
            code = daemon.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        raise SystemExit(f"the daemon ended with exit code {code}:\n{log}")


async def drive(base_url: str, arguments: argparse.Namespace, console: Console) -> list[TurnResult]:
    """Runs all agents at once and returns their turns in the order in which they ended."""
    results: list[TurnResult] = []

    def on_turn(result: TurnResult) -> None:
        results.append(result)
        console.print(
            f"  {result.agent:<11} turn {result.turn}: {result.num_prompt_tokens:>5} prompt tokens, "
            f"{result.num_cached_tokens:>5} cached, first token after {result.ttft_s * 1e3:>5.0f} ms  "
            f"-> {result.action[0]}[{result.action[1][:50]}]",
            highlight=False,
            markup=False,
        )

    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none") as client:
        model = (await client.models.list()).data[0].id
        console.print(f"Three agents talk to [bold]{base_url}/v1[/] (model {model}):")
        agents = [Agent(task, client, model, Tools(ROOT), arguments.max_tokens, on_turn) for task in TASKS]
        await asyncio.gather(*(agent.run(arguments.turns) for agent in agents))
    return results


def write_report(base_url: str, results: list[TurnResult], out: Path, console: Console) -> None:
    with urllib.request.urlopen(f"{base_url}/health", timeout=10) as answer:
        health = json.load(answer)
    print_table(results, console)
    console.print(summary(results), highlight=False)
    caption = (
        f"{health['model']} in {health['dtype']}, executor {health['executor']} ({health['device']}), "
        f"agentserve {__version__}"
    )
    plot_timeline(results, out / "timeline.png", caption)
    plot_turns(results, out / "turns.png", caption)
    conditions = {
        "command": "scripts/demo " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "machine": describe_machine(),
        **health,
    }
    record = {"conditions": conditions, "turns": [dataclasses.asdict(result) for result in results]}
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"Written to {out}: timeline.png, turns.png, results.json, daemon.log", highlight=False)


def print_how_to_talk(base_url: str, pid: int, console: Console) -> None:
    console.print(
        f"""
The daemon keeps running (process {pid}; stop it with: kill {pid}). Talk to it:

  curl {base_url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

or point any OpenAI client at it: OPENAI_BASE_URL={base_url}/v1 OPENAI_API_KEY=none
Its state: {base_url}/health and {base_url}/metrics""",
        highlight=False,
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
