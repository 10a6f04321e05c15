"""Which weights a model has: what is computed with others cannot be used again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from agentserve.errors import ModelFormatError
from agentserve.models.registry import ModelSource

_NUM_SAMPLES, _SAMPLE_BYTES = 256, 1024


def weights_fingerprint(source: ModelSource, *, load_format: str, seed: int) -> str:
    """A digest of names, sizes, dates and samples of the files of weights; of the seed if the weights are random.

    Reading all of a large model would take as long as loading it. Training changes almost every weight, and an edit of
    a file its date. Raises ModelFormatError if a file cannot be read.
    """
    if load_format == "dummy" or source.path is None:
        return f"random weights, seed {seed}"
    files = [source.path] if source.path.is_file() else sorted(source.path.glob("*.safetensors"))
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path in files:
            _add_file(digest, path)
    except OSError as error:
        raise ModelFormatError(f"cannot read {source.path}: {error.strerror}") from None
    return digest.hexdigest()


def _add_file(digest: hashlib.blake2b, path: Path) -> None:
    with path.open("rb") as file:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for index in range(_NUM_SAMPLES):
            file.seek(status.st_size * index // _NUM_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
