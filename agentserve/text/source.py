"""What the text side needs to know of a model's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class EndTokens(Protocol):
    """The part of a model's configuration that concerns text."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class TextSource(Protocol):
    """The files of a model; `agentserve.models.registry.ModelSource` is one."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str | None:
        """`gguf`, `hf` or None."""
        ...

    @property
    def path(self) -> Path | None:
        """The GGUF file or the Hugging Face directory."""
        ...

    @property
    def config(self) -> EndTokens | None: ...

    def gguf_metadata(self) -> Mapping[str, Any]:
        """The metadata of a GGUF file."""
        ...
