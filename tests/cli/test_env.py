"""`agentserve env`: settings that parse in the format of each client."""

from __future__ import annotations

import json
import shlex
import tomllib

import pytest

from agentserve.cli import main
from agentserve.cli.client_settings import Endpoint, client_names, settings_for
from agentserve.cli.env import assignments, clean_url
from agentserve.errors import ConfigError

URL = "http://127.0.0.1:9"  # the discard port: nobody answers
ENDPOINT = Endpoint(url=URL, model="qwen3-8b", api_key="se'cret $x", window=131072)
NAMED = ("--base-url", URL, "--model", "m", "--max-model-len", "4096")


def test_every_client_is_there() -> None:
    assert client_names() == (
        *("claude", "codex", "opencode", "aider", "cline", "continue", "qwen-code"),
        *("langchain", "openai-agents", "smolagents"),
    )


@pytest.mark.parametrize("client", client_names())
@pytest.mark.parametrize("window", [None, 4096])
def test_files_have_the_form_of_their_names(client: str, window: int | None) -> None:
    endpoint = Endpoint(url=URL, model='odd "name"', api_key="k", window=window)
    settings = settings_for(client, endpoint)
    texts = [*settings.env.values(), settings.command or "", *settings.notes]
    for file in settings.files:
        texts.append(file.content)
        if file.path.endswith(".json"):
            json.loads(file.content)
        elif file.path.endswith(".toml"):
            assert tomllib.loads(file.content)["model"] == 'odd "name"'
        elif file.path.endswith(".py"):
            compile(file.content, file.path, "exec")
    assert any(URL in text for text in texts), "no setting has the address"
    assert any("odd" in text for text in texts), "no setting has the model"


def test_addresses_as_each_dialect_wants_them() -> None:
    assert settings_for("claude", ENDPOINT).env["ANTHROPIC_BASE_URL"] == URL
    assert settings_for("aider", ENDPOINT).env["OPENAI_API_BASE"] == f"{URL}/v1"
    (config,) = settings_for("codex", ENDPOINT).files
    provider = tomllib.loads(config.content)["model_providers"]["agentserve"]
    assert (provider["base_url"], provider["wire_api"]) == (f"{URL}/v1", "responses")
    assert tomllib.loads(config.content)["model_context_window"] == 131072


def test_claude_gets_no_window_that_it_would_not_believe() -> None:
    small = settings_for("claude", Endpoint(url=URL, model="m", window=32768)).env
    assert small["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "32768"
    assert "CLAUDE_CODE_AUTO_COMPACT_WINDOW" not in small
    assert settings_for("claude", ENDPOINT).env["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] == "131072"


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("sh", "export OPENAI_API_KEY=" + shlex.quote("se'cret $x")),
        ("fish", r"set -gx OPENAI_API_KEY 'se\'cret $x'"),
        ("powershell", "$env:OPENAI_API_KEY = 'se''cret $x'"),
    ],
)
def test_assignments_are_quoted(shell: str, line: str) -> None:
    assert line in assignments(settings_for("aider", ENDPOINT), shell).splitlines()


@pytest.mark.parametrize("given", [URL, f"{URL}/", f"{URL}/v1", f"{URL}/v1/", f" {URL} "])
def test_addresses_with_and_without_v1(given: str) -> None:
    assert clean_url(given) == URL


@pytest.mark.parametrize("given", ["127.0.0.1:8177", "ftp://x", "", "http://a b", "http://a$(b)"])
def test_addresses_that_are_none(given: str) -> None:
    with pytest.raises(ConfigError, match="must be an http address"):
        clean_url(given)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "claude", *NAMED, "--shell", "sh"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"export ANTHROPIC_BASE_URL={URL}"
    assert all(line.startswith("export ") for line in lines)
    assert main(["env", "opencode", *NAMED]) == 0
    assert "# ---- ~/.config/opencode/opencode.json ----" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ("emacs",),
            "claude, codex, opencode, aider, cline, continue, qwen-code, langchain, openai-agents, smolagents",
        ),
        (("continue", *NAMED, "--shell", "sh"), "reads no variables"),
        (("claude", "--base-url", "x"), "must be an http address"),
        (("claude", "--max-model-len", "0"), "must be positive"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", *arguments]) == 2
    assert part in capsys.readouterr().err


def test_without_a_daemon_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "aider", "--base-url", URL]) == 0
    shown = capsys.readouterr()
    assert f"no daemon answers at {URL}" in shown.err
    assert "export AIDER_MODEL=openai/agentserve" in shown.out
