"""Runs the native CUDA ops on CPU tensors: the extension's own launch code, and its kernels in the PTX emulator.

    def test_something(cuda):
        loss = lmf_loss(cpu_logits, target, backend="native")
        print(cuda.launches[0].kernel, cuda.launches[0].stats.memory["logits"])

The emulator refuses accesses out of bounds, misaligned or uninitialised, and races. As a pytest plugin
(`-p cuda_emulator`) this module turns every native call of a test run into an emulated one.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ptxsim import Device
from ptxsim.machine import LoadedModule
from ptxsim.memory import Memory
from torch import Tensor

from lmf_kernels import _ops

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from cuda_toolkit import NVCC_FLAGS, Toolkit, find_toolkit  # noqa: E402

BUILT = _ops._C is not None and "cuda" in _ops._C.devices()
needs_cuda_build = pytest.mark.skipif(not BUILT, reason="the extension was built without CUDA")

POINTERS = {
    "forward": (
        "logits", "target", "margins", "ldam_weight", "focal_weight", "ldam_normalizer", "focal_normalizer", "loss",
        "stats", "denominators", "partials",
    ),
    "backward": ("grad_output", "logits", "target", "stats", "denominators", "grad_logits"),
}  # fmt: skip
WRITTEN = {"forward": {"loss", "stats", "denominators", "partials"}, "backward": {"grad_logits"}}
MANGLED = {"half": "6__half", "bfloat16": "13__nv_bfloat16", "float": "f", "double": "d"}


@functools.cache
def toolkit() -> Toolkit:
    assert torch.version.cuda is not None
    return find_toolkit(torch.version.cuda)


@functools.cache
def ptx(step: str, arch: int) -> dict[str, str]:
    """Kernel name -> a PTX module with that kernel alone."""
    source = ROOT / "csrc" / f"lmf_cuda_{step}.cu"
    command = [toolkit().nvcc, *NVCC_FLAGS, "-ptx", f"-arch=sm_{arch}", "-lineinfo", source, "-o", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, *kernels = re.split(r"(?=^\.visible \.entry )", text, flags=re.MULTILINE)
    return {re.match(r"\.visible \.entry (\w+)", kernel)[1]: head + kernel for kernel in kernels}


@functools.cache
def module(kernel: str, arch: int) -> LoadedModule:
    """Loads a kernel by the name under which the extension reports it: "forward_pixels half 8 2"."""
    function, element, width, exponentials = kernel.split()
    arguments = MANGLED[element]
    if function.endswith("pixels"):
        arguments += f"Li{width}E"
    part = f"{function}I{arguments}Li{exponentials}E"
    (text,) = (text for name, text in ptx(function.split("_")[0], arch).items() if part in name)
    return Device(capacity=1 << 16).load(text)


@dataclass
class Launch:
    kernel: str
    blocks: int
    threads: int
    stats: Any


@dataclass
class Emulator:
    """Stands in for a device with `multiprocessors`."""

    arch: int = 90
    multiprocessors: int = 132
    options: dict[str, Any] = field(default_factory=lambda: {"racecheck": True})
    launches: list[Launch] = field(default_factory=list)

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _ops._C.trace_cuda_forward(self._launch, self.multiprocessors, *arguments)

    def backward(self, *arguments: Any) -> Tensor:
        return _ops._C.trace_cuda_backward(self._launch, self.multiprocessors, *arguments)

    def _launch(self, kernel: str, shape: list[int], params: bytes, tensors: list[Tensor | None]) -> None:
        loaded = module(kernel, self.arch)
        device = loaded.device
        device.mem = Memory(capacity=1 << 20)
        words = np.frombuffer(params, np.uint64).copy()
        step = kernel.split("_")[0]
        outputs = []
        for i, (name, tensor) in enumerate(zip(POINTERS[step], tensors, strict=True)):
            if tensor is None:
                assert words[i] == 0
                continue
            array = self._to_device(device, name, tensor, name in WRITTEN[step])
            words[i] = array.ptr + tensor.storage_offset() * tensor.element_size()
            if name in WRITTEN[step]:
                outputs.append((name, array, tensor))
        if step == "forward":
            counter = device.zeros(1, np.int64, name="counter")
            words[len(tensors)] = counter.ptr
        blocks, threads, shared = shape
        stats = loaded.launch(None, (blocks,), (threads,), [words.tobytes()], shared, **self.options)
        self.launches.append(Launch(kernel, blocks, threads, stats))
        if step == "forward":
            assert counter.numpy() == 0, "the counter was not left at zero"
        for name, array, tensor in outputs:
            if name == "partials":
                continue
            assert tensor.numel() == 0 or array.initialised().all(), f"{name} was not written completely"
            _bytes(tensor).copy_(torch.from_numpy(array.bits()))

    def _to_device(self, device: Device, name: str, tensor: Tensor, written: bool) -> Any:
        data = _bytes(tensor)
        return device.empty(data.shape, np.uint8, name) if written else device.array(data, name=name)


def _bytes(tensor: Tensor) -> Tensor:
    """All of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@pytest.fixture(name="cuda")
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """The native backend on CPU tensors is the emulated CUDA backend."""
    emulator = Emulator()
    monkeypatch.setitem(_ops.EAGER, "native", (emulator.forward, emulator.backward))
    return emulator


def pytest_configure(config: pytest.Config) -> None:
    emulator = Emulator()
    _ops.EAGER["native"] = _ops.OPS["native"] = (emulator.forward, emulator.backward)
