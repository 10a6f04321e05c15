"""What the settings of clients are made of, asked of a daemon that runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agentserve.build.parts import window
from agentserve.cli import main
from agentserve.config import ServeConfig
from agentserve.errors import ConfigError
from agentserve.models.aliases import ALIASES
from tests.clients.harness import MODEL, WEATHER, WINDOW, serve
from tests.core import builders


async def test_env_asks_the_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serve(tmp_path, WEATHER) as daemon:
        assert await asyncio.to_thread(main, ["env", "claude", "--base-url", f"{daemon.url}/v1", "--shell", "sh"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert f"export ANTHROPIC_MODEL={MODEL}" in shown.out.splitlines()
    assert f"export CLAUDE_CODE_MAX_CONTEXT_TOKENS={WINDOW}" in shown.out.splitlines()


def test_a_script_can_pretend_to_any_window() -> None:
    model, capabilities = ALIASES["qwen3-8b"].config, builders.simulated().capabilities()
    assert window(ServeConfig(script="s.jsonl", max_model_len=131072), model, capabilities) == 131072
    with pytest.raises(ConfigError, match="exceeds the 40960 tokens"):
        window(ServeConfig(max_model_len=131072), model, capabilities)
