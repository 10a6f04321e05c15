from __future__ import annotations

import pytest

from agentserve.models.loader import load_model
from tests.models.builders import SMOLLM2


@pytest.fixture(scope="session")
def smollm2_model():
    return load_model(SMOLLM2)
