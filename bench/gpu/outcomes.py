"""A pytest plugin that writes each outcome at once: a run that is stopped has said what it knew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.tests import LOG_VARIABLE


def _write(test: str, when: str, outcome: str, seconds: float, text: str) -> None:
    value: dict[str, Any] = {"test": test, "when": when, "outcome": outcome, "seconds": seconds, "text": text}
    with Path(os.environ[LOG_VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test: that of its call, or of a setup or teardown that did not pass."""
    if report.when == "call" or report.outcome != "passed":
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        _write(report.nodeid, report.when or "", report.outcome, report.duration, text)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported."""
    if report.failed:
        _write(report.nodeid, "collect", "failed", 0.0, report.longreprtext)
