"""torch.cuda for machines without a GPU, so that what is written for one runs on the CPU, line by line.

    with cuda_stubs(): ...        streams, events, graphs and the profiler of torch.cuda, with torch's own signatures
    with triton_on_cpu(): ...     and backend="triton", whose launches go to the emulator

As a pytest plugin (`pytest -p gpu_stubs tests/test_gpu.py`) it does both for tests/test_gpu.py.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
CPU = torch.device("cpu")
MILLISECONDS = 2.0  # between any two events

_tape: list | None = None  # what a graph that is being captured has to do


class Tape(TorchDispatchMode):
    """Records operations; done again, they write over the results that they gave."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)

        @torch.no_grad()
        def again():
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        _tape.append(again)
        return result


class Graph:
    def __init__(self, keep_graph=False):
        self.steps = []

    def replay(self):
        for step in self.steps:
            step()


@contextlib.contextmanager
def capture(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    global _tape
    _tape = cuda_graph.steps
    try:
        with Tape():
            yield
    finally:
        _tape = None


class Stream:
    def __init__(self, device=None, priority=0):
        pass

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


class Event:
    def __init__(self, enable_timing=False):
        self.timed = enable_timing

    def record(self, stream=None):
        pass

    def elapsed_time(self, end_event):
        assert self.timed and end_event.timed
        return MILLISECONDS


class Profile:
    """Sees two kernels."""

    def __init__(self, activities=None):
        assert all(isinstance(a, torch.profiler.ProfilerActivity) for a in activities)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def events(self):
        cuda = torch.autograd.DeviceType.CUDA
        names = "forward_kernel", "backward_kernel"
        events = [SimpleNamespace(name=name, device_type=cuda) for name in names]
        return [*events, SimpleNamespace(name="cudaLaunchKernel", device_type=torch.autograd.DeviceType.CPU)]


def signed(stub, real):
    """The stub, which refuses arguments that torch's function does not take."""
    signature = inspect.signature(real)

    def call(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return stub(*args, **kwargs)

    return call


@contextlib.contextmanager
def cuda_stubs():
    nothing, stream = (lambda *_: None), Stream()
    functions = {
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "a stub",
        "synchronize": nothing,
        "empty_cache": nothing,
        "set_sync_debug_mode": nothing,
        "current_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        for name, stub in functions.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, signed(stub, getattr(torch.cuda, name))))
        for name, stub in {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": capture}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        stack.enter_context(mock.patch.object(torch.profiler, "profile", Profile))
        yield


@contextlib.contextmanager
def triton_on_cpu():
    """Launches go to the emulator, also those of a graph's replay; a device has one multiprocessor."""
    from gpu_offline import device_of
    from ptxsim.emulate import emulate

    from lmf_kernels.triton import launch as triton_launch

    launch = triton_launch._launch

    def taped(*args):
        launch(*args)
        if _tape is not None:
            _tape.append(lambda: launch(*args))

    with device_of(1), emulate(target=90) as launches, mock.patch.object(triton_launch, "_launch", taped):
        yield launches


def pytest_configure(config):
    config.stubs = contextlib.ExitStack()
    config.there_is_a_gpu = mock.patch.object(torch.cuda, "is_available", lambda: True)
    config.there_is_a_gpu.start()
    config.stubs.enter_context(cuda_stubs())
    config.stubs.enter_context(triton_on_cpu())


def pytest_unconfigure(config):
    config.stubs.close()


def pytest_collection_modifyitems(config, items):
    config.there_is_a_gpu.stop()  # or torch.compile asks for one's properties
    for item in items:
        item.module.CUDA = CPU  # after its parametrization asked for the backends of "cuda"
