"""What was recorded is decided again, and a difference is found."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from agentserve.build import build_engine
from agentserve.config import ServeConfig
from agentserve.core.events import EndRequest, EngineEvent, RequestFinished
from agentserve.errors import ConfigError, EngineError, RecordingError
from agentserve.runtime.live import LiveDriver, MonotonicClock
from agentserve.runtime.recording import Header, Recorder, Recording
from agentserve.runtime.replay import build_core, replay
from tests.core.builders import header, simulated, submit


def record_live(path: Path, live_header: Header, num_requests: int = 12) -> None:
    """A live driver in its thread on the real clock, with simulated timing; commands come while it works."""
    ended: set[str] = set()
    done = threading.Event()

    def on_events(events: Sequence[EngineEvent]) -> None:
        ended.update(event.request_id for event in events if isinstance(event, RequestFinished))
        if len(ended) == num_requests:
            done.set()

    config = live_header.config
    driver = LiveDriver(
        build_core(live_header),
        simulated(config.num_blocks, config.block_size),
        MonotonicClock(),
        on_events=on_events,
        on_failure=pytest.fail,
        recorder=Recorder(path, live_header),
    )
    driver.start()
    for index in range(num_requests):
        prompt = (*range(index % 3 * 100, index % 3 * 100 + 20), index)
        driver.post(submit(f"r{index}", prompt, max_tokens=4, seed=index))
        if index % 4 == 3:
            driver.post(EndRequest(f"r{index}"))
    assert done.wait(30)
    driver.stop()
    with pytest.raises(EngineError):
        driver.post(submit("late", 3))


def test_a_live_run_replays_identically(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record_live(path, header(num_blocks=24, max_model_len=64))
    report = replay(path)
    assert report.identical, report.divergence
    assert report.num_requests == 12
    assert report.num_decisions > 12 * 4
    assert path.stat().st_mode & 0o077 == 0, "prompts are readable by others"


def tampered(path: Path, target: Path) -> Path:
    """A copy in which one sampled token differs from what the core had seen."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        step = json.loads(line)
        if any(output["samples"] for output in step.get("completions", [])):
            step["completions"][0]["samples"][0]["token_id"] += 1
            lines[number] = json.dumps(step)
            break
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def test_a_difference_is_found_and_located(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record_live(path, header())
    report = replay(tampered(path, tmp_path / "tampered.jsonl"))
    assert not report.identical
    assert report.divergence is not None
    assert "recorded: token" in report.divergence
    assert "replayed: token" in report.divergence


def test_a_recording_that_is_cut_off_replays_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record_live(path, header())
    text = path.read_text(encoding="utf-8")
    cut = tmp_path / "cut.jsonl"
    cut.write_text(text[:-30], encoding="utf-8")
    report = replay(cut)
    assert report.identical
    assert report.truncated
    assert report.num_steps == len(text.splitlines()) - 2  # header and the last line are no whole steps


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not the header"),
        ("{}\n", "not the header"),
        ("no json\n", "not the header"),
        ('{"version": 99}\n', "format version 99"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecordingError, match=message):
        replay(path)


def test_a_bad_step_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record_live(path, header())
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[2] = '{"now": 1}'
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(RecordingError, match=r"run\.jsonl:3"):
        replay(path)


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("precious", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot record"):
        Recorder(path, header())
    reported: list[str] = []
    with pytest.raises(ConfigError, match=r"cannot record to .*run\.jsonl: File exists"):
        build_engine(ServeConfig(record=str(path)), reported.append)
    assert not reported, "the model was loaded before that was noticed"
    assert path.read_text(encoding="utf-8") == "precious"
    with pytest.raises(RecordingError, match="cannot read"):
        Recording(tmp_path / "missing.jsonl")
