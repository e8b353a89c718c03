"""Options of the loss benchmarks: pytest benchmarks/ --benchmark-only [--device cuda]."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the benchmarks, for example cuda")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))
