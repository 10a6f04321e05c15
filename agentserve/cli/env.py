"""`agentserve env CLIENT`: print what a client must be told to use this daemon."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agentserve.cli.client_settings import (
    PLACEHOLDER_KEY,
    ClientSettings,
    Endpoint,
    SettingsFile,
    client_names,
    settings_for,
)
from agentserve.errors import ConfigError

if TYPE_CHECKING:
    from agentserve.cli.types import Verbs

DEFAULT_URL = "http://127.0.0.1:8177"
SHELLS = ("sh", "fish", "powershell")
_PROBE_TIMEOUT_S = 1.0
_FALLBACK_MODEL = "agentserve"


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "env",
        help="print the settings of an agent client",
        description="Prints the variables and files that make a client use this daemon. Model and window are asked of "
        'the daemon if it runs. With --shell, only variables: eval "$(agentserve env claude --shell sh)".',
        allow_abbrev=False,
    )
    parser.add_argument("client", metavar="CLIENT", help=", ".join(client_names()))
    parser.add_argument("--base-url", default=DEFAULT_URL, metavar="URL", help=f"(default: {DEFAULT_URL})")
    parser.add_argument("--model", metavar="NAME", help="default: the model that the daemon serves")
    parser.add_argument("--api-key", metavar="KEY", help="the daemon's --api-key [AGENTSERVE_API_KEY]")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="default: the window that the daemon states")
    parser.add_argument("--shell", choices=SHELLS, help="print assignments for this shell, and nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for an unknown client, a wrong URL, or --shell for a client that reads no variables."""
    url = clean_url(arguments.base_url)
    key = arguments.api_key or os.environ.get("AGENTSERVE_API_KEY") or PLACEHOLDER_KEY
    settings_for(arguments.client, Endpoint(url=url, model=""))  # an unknown client is refused before anybody is asked
    model, window = arguments.model, arguments.max_model_len
    if window is not None and window < 1:
        raise ConfigError(f"--max-model-len must be positive, not {window}")
    if model is None or window is None:
        served, stated = _ask_daemon(url, key)
        if served is None:
            print(f"# no daemon answers at {url}: set --model and --max-model-len", file=sys.stderr)
        model = model or served or _FALLBACK_MODEL
        window = window or stated
    settings = settings_for(arguments.client, Endpoint(url=url, model=model, api_key=key, window=window))
    print(render(settings) if arguments.shell is None else assignments(settings, arguments.shell), end="")
    return 0


def clean_url(text: str) -> str:
    """The address without `/v1`, however it was given. Raises ConfigError."""
    url = text.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    if not url.startswith(("http://", "https://")) or any(char.isspace() or char in "'\"\\`$" for char in url):
        raise ConfigError(f"--base-url must be an http address, not {text!r}")
    return url


def render(settings: ClientSettings) -> str:
    """Settings for a person to read: variables as a POSIX shell takes them, files under their names."""
    parts = [f"# {settings.title}\n"]
    if settings.env:
        parts.append(assignments(settings, "sh"))
    parts += [_show_file(file) for file in settings.files]
    if settings.command is not None:
        parts.append(f"# start it\n{settings.command}\n")
    parts += [f"# {note}\n" for note in settings.notes]
    return "\n".join(parts)


def assignments(settings: ClientSettings, shell: str) -> str:
    """One line a variable. Raises ConfigError for a client that reads none."""
    if not settings.env:
        raise ConfigError(f"{settings.title} reads no variables; leave out --shell to see its files and options")
    return "".join(_assign(name, value, shell) + "\n" for name, value in settings.env.items())


def _assign(name: str, value: str, shell: str) -> str:
    if shell == "fish":
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"set -gx {name} '{escaped}'"
    if shell == "powershell":
        escaped = value.replace("'", "''")
        return f"$env:{name} = '{escaped}'"
    return f"export {name}={shlex.quote(value)}"


def _show_file(file: SettingsFile) -> str:
    return f"# ---- {file.path} ----\n{file.content}"


def _ask_daemon(url: str, key: str) -> tuple[str | None, int | None]:
    """Model and window of a daemon that runs there."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    # A proxy of the environment has no business between two programs of one machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_PROBE_TIMEOUT_S) as reply:
            first: Mapping[str, Any] = json.load(reply)["data"][0]
            return str(first["id"]), int(first["max_model_len"])
    except (OSError, ValueError, LookupError, TypeError):
        return None, None
