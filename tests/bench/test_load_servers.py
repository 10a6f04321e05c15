"""Scenarios, and servers that the bench starts, awaits and stops."""

from __future__ import annotations

import os
import textwrap
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from agentserve.cli import main as agentserve
from bench.load.cli import _SCENARIO
from bench.load.errors import ScenarioError, ServerFailedError
from bench.load.servers import ServerSpec, choose, placeholder_values, read_scenario, running

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(sys.argv[2].encode())
print("up", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def spec(code: str, **options: Any) -> ServerSpec:
    return ServerSpec(
        "fake",
        kind="fake",
        label="fake",
        setting="default",
        base_url="http://127.0.0.1:{port}/v1",
        command=("{python}", "-c", code, "{port}", "{vllm}"),
        ready="http://127.0.0.1:{port}/ready",
        **options,
    )


async def test_a_server_is_started_awaited_and_stopped(tmp_path: Path) -> None:
    async with running(spec(SERVER), {"vllm": "a value"}, tmp_path / "logs") as server:
        assert server.exit_code is None
        with urllib.request.urlopen(server.base_url, timeout=10) as answer:
            assert answer.read() == b"a value"
        assert server.log_tail().startswith("up")
        assert server.process is not None
        pid = server.process.pid
    assert server.exit_code is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


async def test_a_server_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ServerFailedError, match=r"fake ended with exit code 3; the end of its log:\nno model"):
        async with running(spec("import sys; print('no model'); sys.exit(3)"), {}, tmp_path):
            raise AssertionError("it never was ready")


async def test_a_server_that_is_never_ready_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(ServerFailedError, match=r"was not ready after 0\.3 s"):
        async with running(spec("import time; time.sleep(60)", ready_timeout_s=0.3), {}, tmp_path):
            raise AssertionError("it never was ready")


def test_the_scenario_of_the_repository() -> None:
    specs = {item.name: item for item in read_scenario(_SCENARIO)}
    assert {item.kind for item in specs.values()} == {"agentserve", "llama-server", "vllm"}
    assert specs["agentserve"].command == ("{python}", "-m", "agentserve", "serve", "--port", "{port}")
    assert specs["llama-256-64"].command[-4:] == ("-b", "256", "-ub", "64")
    assert specs["vllm-128"].env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert specs["vllm-128"].env["HF_HUB_OFFLINE"] == "1"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in specs["vllm"].env
    assert specs["llama"].missing({}) == ["gguf", "llama_server"]
    assert specs["agentserve-tpot-80"].info().title == "agentserve TPOT 80 ms"
    defaults, skipped = choose(list(specs.values()), ["defaults"], {"llama_server": "x", "gguf": "y"})
    assert [item.name for item in defaults] == ["agentserve", "llama"]
    assert skipped[0] == "vllm is left out: --hf-model and --vllm not given (bench/PEERS.md)"


def test_our_servers_options_are_options_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for item in read_scenario(_SCENARIO):
        if item.kind == "agentserve":
            arguments = [text.replace("{port}", "0") for text in item.command[3:]]
            # An address that is refused, after all options have been understood and before a model is loaded.
            assert agentserve([*arguments, "--host", "0.0.0.0"]) == 2
            assert "0.0.0.0 can be reached from other machines" in capsys.readouterr().err


def test_servers_that_run_already_and_names_that_match_nothing() -> None:
    specs = read_scenario(_SCENARIO)
    chosen, skipped = choose(specs, ["agentserve", "agentserve-s*", "ollama=http://localhost:1/v1"], {})
    assert [item.name for item in chosen] == ["agentserve", "agentserve-static", "agentserve-stream", "ollama"]
    assert (chosen[-1].base_url, chosen[-1].command, skipped) == ("http://localhost:1/v1", (), [])
    with pytest.raises(ScenarioError, match="no server or group is called 'sglang'"):
        choose(specs, ["sglang"], {})
    with pytest.raises(ScenarioError, match=r"vllm-128 needs --hf-model and --vllm; bench/PEERS\.md"):
        choose(specs, ["vllm-128"], {})
    with pytest.raises(ScenarioError, match="no server can be run: llama-"):
        choose(specs, ["llama-*"], {})


def test_programs_come_from_the_command_line_then_from_the_environment(tmp_path: Path) -> None:
    given, other = tmp_path / "given", tmp_path / "other"
    given.touch()
    other.touch()
    environ = {"BENCH_VLLM": str(other), "BENCH_GGUF": str(other)}
    values = placeholder_values({"vllm": str(given)}, environ)
    assert values == {"vllm": str(given), "gguf": str(other)}
    with pytest.raises(ScenarioError, match="--hf-model: there is no"):
        placeholder_values({"hf_model": str(tmp_path / "nothing")}, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[server]]\nname = 'a'\nkind = 'k'", "'kind' is missing"),
        ("[kind.k]\nlabel = 'l'\ncommand = ['c']\nready = 'r'\nbase_url = 'b'\n[[server]]\nname = 'a'\nkind = 'x'",
         "'x' is missing"),
        ("[kind.k]\nlabel = 'l'\ncommand = ['c']\nready = 'r'\nbase_url = 'b'\n"
         "[[server]]\nname = 'a'\nkind = 'k'\ntypo = 1", "a: unknown keys typo"),
        ("[kind.k]\nlabel = 'l'\ncommand = ['c']\nready = 'r'\nbase_url = 'b'\n"
         + "[[server]]\nname = 'a'\nkind = 'k'\n" * 2, "the server 'a' is there twice"),
        ("oops", "Expected '='"),
    ],
)  # fmt: skip
def test_wrong_scenarios(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.toml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    with pytest.raises(ScenarioError, match=message):
        read_scenario(path)
