"""Fixtures and defaults of all tests.

`backend` runs a test once for each backend: "reference" and "native", or "triton" where TRITON_INTERPRET=1 is set; the
environment variable LMF_TEST_BACKENDS (names with commas) chooses others.
"""

from __future__ import annotations

import pytest
import torch
from checks import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
