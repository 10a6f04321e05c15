"""The demo's tools read the project and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.demo.tools import Tools, parse_action


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    package = tmp_path / "project" / "agentserve"
    package.mkdir(parents=True)
    (package / "a.py").write_text("def needle():\n\n    return 1\n", encoding="utf-8")
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    return Tools(tmp_path / "project")


def test_the_tools_work(tools: Tools) -> None:
    assert tools.run("list_files", ".") == "agentserve/"
    assert tools.run("read_file", "agentserve/a.py") == "def needle():\n    return 1"
    assert tools.run("search", "NEEDLE") == "agentserve/a.py:1: def needle():"
    assert tools.run("calculate", "(30 + 12) * 2 // -4") == "-21"


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("read_file", "../secret"),
        ("list_files", "/"),
        ("read_file", "nothing.py"),
        ("read_file", "\0"),
        ("search", ""),
        ("calculate", "__import__('os')"),
        ("calculate", "9 ** 9"),
        ("calculate", "1 / 0"),
        ("calculate", "1 +"),
    ],
)
def test_what_they_refuse_is_an_observation(tools: Tools, name: str, argument: str) -> None:
    assert tools.run(name, argument).startswith("error: ")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Thought: look.\nAction: list_files[.]", ("list_files", ".")),
        ("Action: search(class A)", ("search", "class A")),
        ("Action: calculate[2 * 3", ("calculate", "2 * 3")),
        ("Action: rm[-rf]\nAction: read_file[x]", ("read_file", "x")),
        ("Action: list_files", None),
        ("Answer: done", None),
    ],
)
def test_actions_are_found_in_replies(text: str, action: tuple[str, str] | None) -> None:
    assert parse_action(text, ("list_files", "read_file", "search", "calculate")) == action
