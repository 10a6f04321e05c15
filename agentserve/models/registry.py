"""From a name on the command line to the files and the shape of a model. Never downloads; needs no torch."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentserve.errors import ModelFormatError, UnknownModelError
from agentserve.models.aliases import ALIASES, KnownModel
from agentserve.models.config import ModelConfig
from agentserve.models.gguf_config import read_gguf_config
from agentserve.models.gguf_file import read_gguf_header
from agentserve.models.hf_config import read_hf_config


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is."""

    name: str
    """What to call it: the alias, the hub id, or the name of the directory or file."""
    kind: Literal["gguf", "hf"] | None
    """The format of the files, None if there are none."""
    path: Path | None
    """The GGUF file or the Hugging Face directory; None if no files were found."""
    config: ModelConfig | None
    """The shape of the model."""

    def gguf_metadata(self) -> Mapping[str, Any]:
        """The metadata of the GGUF file. Raises ModelFormatError if it is damaged; only for `kind == "gguf"`."""
        assert self.kind == "gguf" and self.path is not None
        return read_gguf_header(self.path).metadata


def resolve_model(name: str) -> ModelSource:
    """Finds a model: an alias, a directory with `config.json`, a `.gguf` file, or a hub id in the local cache.

    A known model without files has path None; the caller may simulate it.

    Raises UnknownModelError when there is no such model, and ModelFormatError or UnsupportedModelError when there is
    one that cannot be used.
    """
    known = ALIASES.get(name.lower()) or _by_repo_id(name)
    if known is not None:
        return _resolve_known(name.lower() if name.lower() in ALIASES else name, known)
    local = _from_path(name)
    if local is not None:
        return local
    snapshot = _find_snapshot(name)
    if snapshot is not None:
        return _from_directory(name, snapshot)
    raise UnknownModelError(_unknown(name))


def _from_path(name: str) -> ModelSource | None:
    if not name:  # would be the current directory
        return None
    try:
        path = Path(name).expanduser()
        is_file, is_directory = path.is_file(), path.is_dir()
    except (OSError, RuntimeError):  # too long for a path, or the home of a user that does not exist
        return None
    if is_file:
        return _from_file(path)
    return _from_directory(path.resolve().name, path) if is_directory else None


def _resolve_known(name: str, known: KnownModel) -> ModelSource:
    path = _find_in_package(known.package) if known.package else None
    if path is not None:
        return ModelSource(name, "gguf", path, read_gguf_config(read_gguf_header(path)))
    snapshot = _find_snapshot(known.repo_id) if known.repo_id else None
    # A half-finished download has no weights: then the published shape is what we have.
    if snapshot is not None and any(snapshot.glob("*.safetensors")):
        return _from_directory(name, snapshot)
    return ModelSource(name, None, None, known.config)


def _by_repo_id(name: str) -> KnownModel | None:
    matches = (known for known in ALIASES.values() if known.repo_id and known.repo_id.lower() == name.lower())
    return next(matches, None)


def _from_file(path: Path) -> ModelSource:
    if path.suffix.lower() != ".gguf":
        raise ModelFormatError(f"{path} is no .gguf file; a Hugging Face model is named by its directory")
    return ModelSource(path.stem, "gguf", path, read_gguf_config(read_gguf_header(path)))


def _from_directory(name: str, path: Path) -> ModelSource:
    if not (path / "config.json").is_file():
        raise ModelFormatError(f"{path} is no model: it has no config.json")
    return ModelSource(name, "hf", path, read_hf_config(path))


def _find_in_package(package: str) -> Path | None:
    """The GGUF file in an installed package, without running any of its code."""
    spec = importlib.util.find_spec(package)
    for directory in (spec.submodule_search_locations or ()) if spec is not None else ():
        files = sorted(Path(directory).glob("*.gguf"))
        if files:
            return files[0]
    return None


def _find_snapshot(repo_id: str) -> Path | None:
    """The directory of a repository in the local Hugging Face cache, by the cache's documented layout."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) is None:
        return None
    repository = _hub_cache() / f"models--{repo_id.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = repository / "snapshots" / revision
    return snapshot if (snapshot / "config.json").is_file() else None


def _hub_cache() -> Path:
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    default_home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", default_home)).expanduser() / "hub"


def _unknown(name: str) -> str:
    message = f"unknown model {name!r}"
    close = difflib.get_close_matches(name.lower(), ALIASES, n=3, cutoff=0.6)
    if close:
        message += f"; did you mean {' or '.join(close)}?"
    message += f" Known names: {', '.join(ALIASES)}; or give a directory with config.json or a .gguf file"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        message += f", or fetch it into the Hugging Face cache first (hf download {name})"
    return message
