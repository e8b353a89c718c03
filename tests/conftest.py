"""Fixtures and defaults of all tests.

`backend` runs a test once for each backend: "reference" and "native", or "triton" where TRITON_INTERPRET=1 is set; the
environment variable LMF_TEST_BACKENDS (names with commas) chooses others. HYPOTHESIS_PROFILE chooses how many examples
the property tests try.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from checks import BACKENDS, INTERPRETED
from hypothesis import HealthCheck, settings

# The fixture `backend` is a string, which no example changes; drawing tensors is slow for hypothesis' taste.
_CALM = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], print_blob=True
)
settings.register_profile("quick", _CALM, max_examples=40, derandomize=True)
settings.register_profile("ci", _CALM, max_examples=200, derandomize=True)
settings.register_profile("nightly", _CALM, max_examples=2500)
settings.register_profile("interpreter", _CALM, max_examples=4, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "interpreter" if INTERPRETED else "quick"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What torch.compile finds in its cache may be code for other instructions (ATEN_CPU_CAPABILITY): wrong numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
