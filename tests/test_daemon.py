"""The real daemon as a process, with the official SDK: SmolLM2 on the CPU, and the simulated fallback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from agentserve.runtime.replay import replay
from tests.models.builders import requires_smollm2

BLOCK_SIZE = 16


@contextmanager
def daemon(tmp_path: Path, *arguments: str) -> Iterator[tuple[str, Path]]:
    """Starts `agentserve serve` on a free port; yields its address and its log. It must end with exit code 0."""
    log_path = tmp_path / "daemon.log"
    env = {key: value for key, value in os.environ.items() if not key.startswith("AGENTSERVE_")}
    env |= {"HF_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "agentserve", "serve", "--port", "0", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
        )
    try:
        deadline = time.monotonic() + 120
        while not (match := re.search(r"listening on (http://\S+)", log_path.read_text(encoding="utf-8"))):
            assert process.poll() is None, log_path.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, log_path.read_text(encoding="utf-8")
            time.sleep(0.05)
        yield match[1], log_path
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log_path.read_text(encoding="utf-8")
    finally:
        process.kill()
        process.wait()


def get_json(url: str) -> dict[str, object]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


@requires_smollm2
@pytest.mark.smollm2
def test_the_default_daemon_answers_and_resumes(tmp_path: Path) -> None:
    recording = tmp_path / "run.jsonl"
    system = "You are a helpful assistant. " + " ".join(f"Rule {i}: answer briefly and politely." for i in range(60))
    with (
        daemon(tmp_path, "--record", str(recording)) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        assert get_json(f"{url}/health")["executor"] == "cpu"
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": "What is the capital of France?"},
        ]
        turns = []
        for question in ("And of Germany?", ""):
            sent = time.monotonic()
            first = None
            text = ""
            stream = client.chat.completions.create(
                model="smollm2-135m",
                messages=messages,  # type: ignore[arg-type]
                max_tokens=24,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    first = first or time.monotonic()
                    text += chunk.choices[0].delta.content
                usage = chunk.usage or None
            assert first is not None and usage is not None and usage.prompt_tokens_details is not None
            turns.append((usage, first - sent, text))
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]
    (cold, cold_ttft, cold_text), (resumed, resumed_ttft, _) = turns
    assert "Paris" in cold_text
    # The prompt's KV and that of the answer but for its last token, which was sampled and never computed.
    known = cold.prompt_tokens + cold.completion_tokens - 1
    assert resumed.prompt_tokens_details.cached_tokens == known // BLOCK_SIZE * BLOCK_SIZE
    assert resumed.model_extra["agentserve"]["work_class"] == "resume_prefill"
    # Hundreds of tokens against some dozens: not a benchmark, but far apart on any machine.
    assert resumed_ttft < cold_ttft / 2, (cold_ttft, resumed_ttft)
    report = replay(recording)
    assert report.identical, report.divergence
    assert report.num_requests == 2


def test_without_weights_timing_is_simulated_and_everything_says_so(tmp_path: Path) -> None:
    with daemon(tmp_path, "--model", "qwen2.5-7b", "--gpu", "rtx-4090") as (url, log_path):
        health = get_json(f"{url}/health")
        assert health["simulated"] is True
        assert "timing is simulated because" in str(health["note"])
        assert "RTX 4090" in str(health["device"])
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            raw = client.chat.completions.with_raw_response.create(
                model="qwen2.5-7b", messages=[{"role": "user", "content": "hello"}]
            )
            assert raw.headers["x-agentserve-executor"] == "simulated"
            assert raw.parse().choices[0].finish_reason == "stop"
        banner = log_path.read_text(encoding="utf-8")
    assert "SIMULATED" in banner
    assert "no weights of qwen2.5-7b were found" in banner
