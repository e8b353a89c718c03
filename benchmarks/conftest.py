"""Options of the loss benchmarks: pytest benchmarks/ --benchmark-only [--device cuda] [--backend native]."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the benchmarks, for example cuda")
    parser.addoption("--backend", default="auto", help="backend of the fused loss: auto, triton or native")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def backend(request):
    return request.config.getoption("--backend")
