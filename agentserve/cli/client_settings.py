"""What each agent client must be told to use this daemon: variables, files and code, as data.

`bench/clients` runs the real command-line clients with exactly these settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from agentserve.errors import ConfigError

PLACEHOLDER_KEY = "none"
"""Most clients refuse to start without a key, also where the server asks for none."""

# Not the AGENTSERVE_API_KEY that the daemon reads: a daemon started from the same shell would ask for that key.
_KEY_VARIABLE = "AGENT_SERVER_KEY"
_CLAUDE_LEAST_COMPACT_WINDOW = 100_000
"""Claude Code takes every smaller number for this one, and says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The daemon as a client sees it."""

    url: str
    """Without `/v1` and without a slash at the end."""
    model: str
    api_key: str = PLACEHOLDER_KEY
    window: int | None = None
    """Tokens of prompt and answer together; None if it is not known."""

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsFile:
    """A file of a client, or code of its user."""

    path: str
    """`~/...`, or a name in the project."""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Everything a client must be told."""

    title: str
    env: Mapping[str, str] = field(default_factory=dict)
    files: tuple[SettingsFile, ...] = ()
    command: str | None = None
    """How it is started then."""
    notes: tuple[str, ...] = ()


def settings_for(client: str, endpoint: Endpoint) -> ClientSettings:
    """Raises ConfigError, which lists all clients, for one that is not known."""
    make = _CLIENTS.get(client.lower())
    if make is None:
        raise ConfigError(f"no settings for {client!r}; there are some for {', '.join(_CLIENTS)}")
    return make(endpoint)


def client_names() -> tuple[str, ...]:
    return tuple(_CLIENTS)


# ---- command-line agents ----


def _claude(endpoint: Endpoint) -> ClientSettings:
    env = {
        "ANTHROPIC_BASE_URL": endpoint.url,
        "ANTHROPIC_AUTH_TOKEN": endpoint.api_key,
        "ANTHROPIC_MODEL": endpoint.model,
        # Titles, summaries and sub-agents ask for models by these names.
        "ANTHROPIC_DEFAULT_OPUS_MODEL": endpoint.model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": endpoint.model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": endpoint.model,
        "CLAUDE_CODE_SUBAGENT_MODEL": endpoint.model,
        # A line that changes with every request at the very begin of the prompt; the server would remove it as well.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    if endpoint.window is not None:
        env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(endpoint.window)
        if endpoint.window >= _CLAUDE_LEAST_COMPACT_WINDOW:
            env["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] = str(endpoint.window)
    return ClientSettings(
        title="Claude Code",
        env=env,
        command="claude",
        notes=("Its system prompt and tools alone are 25,000 to 35,000 tokens: serve a model with a larger window.",),
    )


def _codex(endpoint: Endpoint) -> ClientSettings:
    window = "" if endpoint.window is None else f"model_context_window = {endpoint.window}\n"
    config = f"""\
model = {_toml(endpoint.model)}
model_provider = "agentserve"
{window}web_search = "disabled"

[model_providers.agentserve]
name = "agentserve"
base_url = {_toml(endpoint.openai_url)}
wire_api = "responses"
env_key = "{_KEY_VARIABLE}"
"""
    return ClientSettings(
        title="Codex CLI",
        env={_KEY_VARIABLE: endpoint.api_key},
        files=(SettingsFile(path="~/.codex/config.toml", content=config),),
        command="codex",
    )


def _opencode(endpoint: Endpoint) -> ClientSettings:
    model: dict[str, object] = {"name": endpoint.model, "tool_call": True}
    if endpoint.window is not None:
        model["limit"] = {"context": endpoint.window, "output": min(8192, endpoint.window // 4)}
    config = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {
            "agentserve": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "agentserve",
                "options": {"baseURL": endpoint.openai_url, "apiKey": endpoint.api_key},
                "models": {endpoint.model: model},
            }
        },
        "model": f"agentserve/{endpoint.model}",
        "small_model": f"agentserve/{endpoint.model}",
    }
    return ClientSettings(
        title="opencode",
        files=(SettingsFile(path="~/.config/opencode/opencode.json", content=_json(config)),),
        command="opencode",
    )


def _qwen_code(endpoint: Endpoint) -> ClientSettings:
    generation = {} if endpoint.window is None else {"generationConfig": {"contextWindowSize": endpoint.window}}
    config = {
        "security": {"auth": {"selectedType": "openai"}},
        "model": {"name": endpoint.model},
        "modelProviders": {
            "openai": [
                {
                    "id": endpoint.model,
                    "name": endpoint.model,
                    "baseUrl": endpoint.openai_url,
                    "envKey": _KEY_VARIABLE,
                    **generation,
                }
            ]
        },
        "privacy": {"usageStatisticsEnabled": False},
    }
    return ClientSettings(
        title="Qwen Code",
        env={_KEY_VARIABLE: endpoint.api_key},
        files=(SettingsFile(path="~/.qwen/settings.json", content=_json(config)),),
        command="qwen",
    )


def _aider(endpoint: Endpoint) -> ClientSettings:
    files: tuple[SettingsFile, ...] = ()
    if endpoint.window is not None:
        metadata = {
            f"openai/{endpoint.model}": {
                "max_input_tokens": endpoint.window,
                "max_output_tokens": endpoint.window,
                "input_cost_per_token": 0,
                "output_cost_per_token": 0,
                "litellm_provider": "openai",
                "mode": "chat",
            }
        }
        files = (SettingsFile(path="~/.aider.model.metadata.json", content=_json(metadata)),)
    return ClientSettings(
        title="aider",
        env={
            "OPENAI_API_BASE": endpoint.openai_url,
            "OPENAI_API_KEY": endpoint.api_key,
            "AIDER_MODEL": f"openai/{endpoint.model}",
            "AIDER_ANALYTICS_DISABLE": "true",
        },
        files=files,
        command="aider",
    )


# ---- editors ----


def _cline(endpoint: Endpoint) -> ClientSettings:
    command = (
        f"cline auth --provider openai --baseurl {endpoint.openai_url} --apikey {endpoint.api_key} "
        f"--modelid {endpoint.model}"
    )
    window = "" if endpoint.window is None else f", Context Window Size {endpoint.window}"
    return ClientSettings(
        title="Cline",
        command=command,
        notes=(
            "In VS Code, in the settings of the panel: API Provider OpenAI Compatible, Base URL "
            f"{endpoint.openai_url}, API Key {endpoint.api_key}, Model ID {endpoint.model}{window}.",
        ),
    )


def _continue(endpoint: Endpoint) -> ClientSettings:
    options = (
        "" if endpoint.window is None else f"    defaultCompletionOptions:\n      contextLength: {endpoint.window}\n"
    )
    config = f"""\
name: agentserve
version: 1.0.0
schema: v1
models:
  - name: {json.dumps(endpoint.model)}
    provider: openai
    model: {json.dumps(endpoint.model)}
    apiBase: {endpoint.openai_url}
    apiKey: {json.dumps(endpoint.api_key)}
    roles: [chat, edit, apply, summarize]
    capabilities: [tool_use]
{options}"""
    return ClientSettings(
        title="Continue",
        files=(SettingsFile(path="~/.continue/config.yaml", content=config),),
        command="cn --config ~/.continue/config.yaml",
        notes=("Without the capability tool_use its agent mode stays off for models that it does not know.",),
    )


# ---- frameworks ----


def _langchain(endpoint: Endpoint) -> ClientSettings:
    return _snippet(
        "LangChain (langchain-openai)",
        f"""\
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model={endpoint.model!r},
    base_url={endpoint.openai_url!r},
    api_key={endpoint.api_key!r},
    stream_usage=True,  # with an address of one's own it is off
)
""",
    )


def _openai_agents(endpoint: Endpoint) -> ClientSettings:
    return _snippet(
        "OpenAI Agents SDK",
        f"""\
from agents import Agent, set_default_openai_client, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)  # traces would go to the maker of the SDK
set_default_openai_client(
    AsyncOpenAI(base_url={endpoint.openai_url!r}, api_key={endpoint.api_key!r}), use_for_tracing=False
)
agent = Agent(name="agent", model={endpoint.model!r})
""",
    )


def _smolagents(endpoint: Endpoint) -> ClientSettings:
    return _snippet(
        "smolagents",
        f"""\
from smolagents import OpenAIServerModel, ToolCallingAgent

model = OpenAIServerModel(
    model_id={endpoint.model!r}, api_base={endpoint.openai_url!r}, api_key={endpoint.api_key!r}
)
agent = ToolCallingAgent(tools=[], model=model)
""",
    )


def _snippet(title: str, code: str) -> ClientSettings:
    return ClientSettings(title=title, files=(SettingsFile(path="agent.py", content=code),))


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _toml(text: str) -> str:
    """A basic string of TOML; its escapes are those of JSON."""
    return json.dumps(text)


_CLIENTS: Mapping[str, Callable[[Endpoint], ClientSettings]] = {
    "claude": _claude,
    "codex": _codex,
    "opencode": _opencode,
    "aider": _aider,
    "cline": _cline,
    "continue": _continue,
    "qwen-code": _qwen_code,
    "langchain": _langchain,
    "openai-agents": _openai_agents,
    "smolagents": _smolagents,
}
