"""Runs the native CUDA ops on CPU tensors: the extension's own launch code, and its kernels in the PTX emulator.

    def test_something(cuda):
        loss = lmf_loss(cpu_logits, target, backend="native")
        print(cuda.launches[0].kernel, cuda.launches[0].stats.memory["logits"])

The emulator refuses accesses out of bounds, misaligned or uninitialised, and races. As a pytest plugin
(`-p cuda_emulator`) this module turns every native call of a test run into an emulated one.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ptxsim import Device
from ptxsim.machine import LoadedModule
from ptxsim.memory import GLOBAL_BASE, Memory
from torch import Tensor

from lmf_kernels import _backends, _ops
from lmf_kernels._build.toolkit import NVCC_FLAGS, Toolkit, find_toolkit

ROOT = Path(__file__).parent.parent

BUILT = _ops._C is not None and "cuda" in _ops._C.devices()
needs_cuda_build = pytest.mark.skipif(not BUILT, reason="needs the CUDA kernels: LMF_BUILD_CUDA=1 builds them")

POINTERS = {
    "forward": (
        "logits", "target", "margins", "ldam_weight", "focal_weight", "ldam_normalizer", "focal_normalizer", "loss",
        "saved", "denominators", "partials",
    ),
    "sums": ("logits", "target", "sums", "partials"),
    "backward": ("grad_output", "logits", "target", "saved", "denominators", "grad_logits"),
}  # fmt: skip
WRITTEN = {
    "forward": {"loss", "saved", "denominators", "partials"},
    "sums": {"sums", "partials"},
    "backward": {"grad_logits"},
}
MANGLED = {"half": "6__half", "bfloat16": "13__nv_bfloat16", "float": "f", "double": "d"}


@functools.cache
def toolkit() -> Toolkit:
    assert torch.version.cuda is not None
    return find_toolkit(torch.version.cuda)


@functools.cache
def ptx(step: str, arch: int) -> dict[str, str]:
    """Kernel name -> a PTX module with that kernel alone."""
    source = ROOT / "csrc" / f"lmf_cuda_{'row_sums' if step == 'sums' else step}.cu"
    command = [toolkit().nvcc, *NVCC_FLAGS, "-ptx", f"-arch=sm_{arch}", "-lineinfo", source, "-o", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, *kernels = re.split(r"(?=^\.visible \.entry )", text, flags=re.MULTILINE)
    return {re.match(r"\.visible \.entry (\w+)", kernel)[1]: head + kernel for kernel in kernels}


def entry(kernel: str) -> str:
    """What the mangled name of a kernel contains."""
    function, element, width, exponentials = kernel.split()
    arguments = MANGLED[element] + (f"Li{width}E" if function.endswith("pixels") else "")
    return f"{function}I{arguments}Li{exponentials}E"


@functools.cache
def module(kernel: str, arch: int) -> LoadedModule:
    """Loads a kernel by the name under which the extension reports it: "forward_pixels half 8 2"."""
    step = kernel.split("_")[0]
    (text,) = (text for name, text in ptx(step, arch).items() if entry(kernel) in name)
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
    # Runs the last block alone, of tensors of which so many last rows have memory and fit in: for launches that are
    # too large to be emulated.
    tail: int | None = None

    def backend(self) -> _backends.Backend:
        """The row of the native backend with these kernels."""
        kernels = _backends.grouped(_ops.Ops(self.forward, self.backward, self.backward_, self.sums))
        return dataclasses.replace(_backends.TABLE["native"], kernels=kernels)

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _ops._C.trace_cuda_forward(self._launch, self.multiprocessors, *arguments)

    def backward(self, *arguments: Any) -> Tensor:
        return _ops._C.trace_cuda_backward(self._launch, self.multiprocessors, *arguments)

    def backward_(self, *arguments: Any) -> None:
        _ops._C.trace_cuda_backward_(self._launch, self.multiprocessors, *arguments)

    def sums(self, *arguments: Any) -> Tensor:
        return _ops._C.trace_cuda_sums(self._launch, self.multiprocessors, *arguments)

    def _launch(self, kernel: str, shape: list[int], params: bytes, tensors: list[Tensor | None]) -> None:
        loaded = module(kernel, self.arch)
        device = loaded.device
        device.mem = Memory(capacity=(1 << 22) + sum(_size(tensor) for tensor in tensors if tensor is not None))
        words = np.frombuffer(params, np.uint64).copy()
        step = kernel.split("_")[0]
        outputs = []
        there: dict[int, tuple[int, list[tuple[int, Any]]]] = {}  # storage -> what _to_device returned
        for i, (name, tensor) in enumerate(zip(POINTERS[step], tensors, strict=True)):
            if tensor is None:
                assert words[i] == 0
                continue
            storage = tensor.untyped_storage().data_ptr()
            if name != "grad_logits" or storage not in there:  # which may lie over the logits
                there[storage] = self._to_device(device, name, tensor, name in WRITTEN[step])
            pointer, pieces = there[storage]
            words[i] = pointer + tensor.storage_offset() * tensor.element_size()
            if name in WRITTEN[step]:
                outputs.append((name, tensor, pieces))
        counted = step != "backward"
        if counted:
            counter = device.zeros(1, np.int64, name="counter")
            words[len(tensors)] = counter.ptr
        blocks, threads, shared = shape
        options = dict(self.options)
        if any(tensor is not None and _is_huge(tensor) for tensor in tensors):
            options["racecheck"] = False  # which has four bytes for each element, and some more
        if self.tail is not None:
            options["ctas"] = [blocks - 1]
        stats = loaded.launch(None, (blocks,), (threads,), [words.tobytes()], shared, **options)
        self.launches.append(Launch(kernel, blocks, threads, stats))
        if counted:
            assert counter.numpy() == 0, "the counter was not left at zero"
        for name, tensor, pieces in outputs:
            if name == "partials":
                continue
            for offset, array in pieces:
                whole = self.tail is not None or tensor.numel() == 0 or array.initialised().all()
                assert whole, f"{name} was not written completely"
                _bytes(tensor)[offset : offset + array.shape[0]].copy_(torch.from_numpy(array.bits()))

    def _to_device(self, device: Device, name: str, tensor: Tensor, written: bool) -> tuple[int, list[tuple[int, Any]]]:
        """Address of the tensor's storage, and what is there: (offset, array of bytes)."""
        memory, data = device.mem, _bytes(tensor)
        base, pieces = memory.top, []
        for offset, size in self._pieces(name, tensor):
            memory.top = base + offset
            piece = data[offset : offset + size]
            array = device.empty(piece.shape, np.uint8, name) if written else device.array(piece, name=name)
            pieces.append((offset, array))
        memory.top = max(memory.top, -(-(base + len(data) + memory.guard) // 256) * 256)
        return GLOBAL_BASE + base, pieces

    def _pieces(self, name: str, tensor: Tensor) -> list[tuple[int, int]]:
        """Offsets and sizes in bytes: the whole storage, or of a huge tensor what it has there."""
        if not _is_huge(tensor) and self.tail is None:
            return [(0, _size(tensor))]
        if self.tail is not None:
            rows = 0 if name in ("logits", "grad_logits") and tensor.dim() == 2 else -1
            if name not in ("saved", "sums") and tensor.dim() > 1 and rows:  # images
                tensor = tensor[-1:]
            tensor = tensor.narrow(rows, max(0, tensor.shape[rows] - self.tail), min(self.tail, tensor.shape[rows]))
        run, steps = 1, []
        for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if step == run and not steps:
                run *= size
            elif step > 0:
                steps.append(range(0, size * step, step))
        starts = sorted(tensor.storage_offset() + sum(at) for at in product(*steps))
        return [(start * tensor.element_size(), run * tensor.element_size()) for start in starts]


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _is_huge(tensor: Tensor) -> bool:
    return _size(tensor) > 1 << 28


def _bytes(tensor: Tensor) -> Tensor:
    """All of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@pytest.fixture(name="cuda")
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """The native backend on CPU tensors is the emulated CUDA backend."""
    emulator = Emulator()
    monkeypatch.setitem(_backends.TABLE, "native", emulator.backend())
    return emulator


def pytest_configure(config: pytest.Config) -> None:
    emulator = Emulator()
    _backends.TABLE["native"] = emulator.backend()
