"""The command-line clients: where they come from, how they are started, and what the scripted model answers them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FILE, WORD = "notes.txt", "periwinkle"
TASK = (
    f"Create the file {FILE} in the current directory. Its content: one line with a colour that you choose. "
    "Then read it back and tell me the colour."
)
READING = "The file is written. Now I read it back."
ANSWER = f"The file {FILE} says {WORD}."
BACKGROUND = "A file with a colour"
"""The answer to everything else: titles, topics, summaries."""

Call = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client. `{python}`, `{work}`, `{home}`, `{model}` and `{task}` in its texts are filled in."""

    name: str
    settings: str
    """Its name for `agentserve env`."""
    package: str
    registry: str = "npm"
    program: str
    """Relative to the folder in which it was installed."""
    arguments: tuple[str, ...]
    version: tuple[str, ...] = ("--version",)
    setup: tuple[tuple[str, ...], ...] = ()
    """Commands that are run first, in the same environment."""
    env: Mapping[str, str] = field(default_factory=dict)
    """What only this test needs: no updates, no questions."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The same, as files in the scratch home."""
    write: Call | None
    read: Call | None
    """The calls of the scripted model. None: the client edits by text, and `edit` is the answer."""
    edit: str = ""
    dialect: str

    def script(self, values: Mapping[str, str]) -> list[dict[str, Any]]:
        """Lines for `serve --script`. Every later step is known by what the model said in the one before."""
        if self.write is None or self.read is None:
            return [{"match": FILE, "reply": self.edit}, {"reply": BACKGROUND}]
        return [
            {"match": ["<tools>", READING, WORD], "reply": ANSWER},
            {"match": ["<tools>", FILE, WORD], "reply": f"{READING}\n{_call(self.read, values)}"},
            {"match": ["<tools>", FILE], "reply": f"I create the file.\n{_call(self.write, values)}"},
            {"reply": BACKGROUND},
        ]


def _call(call: Call, values: Mapping[str, str]) -> str:
    name, arguments = call
    return f"<tool_call>\n{fill(json.dumps({'name': name, 'arguments': dict(arguments)}), values)}\n</tool_call>"


def fill(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def find(names: Sequence[str]) -> list[Client]:
    """Raises KeyError with the name that no client has."""
    return [CLIENTS[name] for name in names] if names else list(CLIENTS.values())


CLIENTS: Mapping[str, Client] = {
    client.name: client
    for client in (
        Client(
            name="claude",
            settings="claude",
            package="@anthropic-ai/claude-code",
            program="node_modules/@anthropic-ai/claude-code/bin/claude.exe",
            arguments=("--print", "{task}", "--permission-mode", "acceptEdits", "--output-format", "text"),
            env={"DISABLE_AUTOUPDATER": "1", "DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1"},
            write=("Write", {"file_path": f"{{work}}/{FILE}", "content": f"{WORD}\n"}),
            read=("Read", {"file_path": f"{{work}}/{FILE}"}),
            dialect="anthropic",
        ),
        Client(
            name="codex",
            settings="codex",
            package="@openai/codex",
            program="node_modules/.bin/codex",
            arguments=("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "{task}"),
            write=("exec_command", {"cmd": f"echo {WORD} > {FILE}"}),
            read=("exec_command", {"cmd": f"cat {FILE}"}),
            dialect="responses",
        ),
        Client(
            name="opencode",
            settings="opencode",
            package="opencode-ai",
            program="node_modules/opencode-ai/bin/opencode.exe",
            arguments=("run", "{task}"),
            env={
                "OPENCODE_DISABLE_AUTOUPDATE": "1",
                "OPENCODE_DISABLE_MODELS_FETCH": "1",
                "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
            },
            write=("write", {"filePath": f"{{work}}/{FILE}", "content": f"{WORD}\n"}),
            read=("read", {"filePath": f"{{work}}/{FILE}"}),
            dialect="chat",
        ),
        Client(
            name="qwen-code",
            settings="qwen-code",
            package="@qwen-code/qwen-code",
            program="node_modules/.bin/qwen",
            arguments=("--yolo", "--prompt", "{task}"),
            env={"QWEN_TELEMETRY_ENABLED": "false"},
            write=("write_file", {"file_path": f"{{work}}/{FILE}", "content": f"{WORD}\n"}),
            read=("read_file", {"file_path": f"{{work}}/{FILE}"}),
            dialect="chat",
        ),
        Client(
            name="cline",
            settings="cline",
            package="cline",
            program="node_modules/.bin/cline",
            setup=(
                ("auth", "--provider", "openai", "--apikey", "none", "--modelid", "{model}", "--baseurl", "{url}/v1"),
            ),
            arguments=("--auto-approve", "true", "--provider", "openai", "{task}"),
            env={"CLINE_NO_AUTO_UPDATE": "1", "CLINE_TELEMETRY_DISABLED": "1"},
            write=("editor", {"path": f"{{work}}/{FILE}", "new_text": f"{WORD}\n"}),
            read=("read_files", {"files": [{"path": f"{{work}}/{FILE}"}]}),
            dialect="chat",
        ),
        Client(
            name="continue",
            settings="continue",
            package="@continuedev/cli",
            program="node_modules/.bin/cn",
            arguments=("--config", "{home}/.continue/config.yaml", "--auto", "--print", "{task}"),
            env={"CONTINUE_TELEMETRY_ENABLED": "0"},
            write=("Write", {"filepath": f"{{work}}/{FILE}", "content": f"{WORD}\n"}),
            read=("Read", {"filepath": f"{{work}}/{FILE}"}),
            dialect="chat",
        ),
        Client(
            name="aider",
            settings="aider",
            package="aider-chat",
            registry="PyPI",
            program="aider/bin/aider",
            arguments=(
                "--yes-always",
                "--no-git",
                "--no-check-update",
                "--no-show-release-notes",
                "--no-show-model-warnings",
                "--edit-format",
                "whole",
                "--message",
                "{task}",
                FILE,
            ),
            write=None,
            read=None,
            edit=f"I write the colour down.\n\n{FILE}\n```\n{WORD}\n```\n\n{ANSWER}",
            dialect="chat",
        ),
    )
}
