"""Where the kernels of these tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.interpreter import interpreted

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(
    scope="module", params=[pytest.param("cuda", marks=pytest.mark.gpu, id="gpu") if HAS_GPU else "interpreted"]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, with kernels interpreted, or the GPU."""
    if request.param == "cuda":
        yield torch.device("cuda", torch.cuda.current_device())
        return
    with interpreted():
        yield torch.device("cpu")
