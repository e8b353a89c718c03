"""The peak of the memory that torch allocates: from its allocator, or from the storages of fake tensors."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmf_kernels._call import MEAN, Options, Tables
from lmf_kernels.linear.call import Classifier, HeadOptions
from lmf_kernels.linear.passes import forward_by_chunks

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")  # as the profiler names them


class PeakMemory(TorchDispatchMode):
    """Inside, counts the bytes of storages that ops allocate and that are still alive; `peak` is the most there were.

    What an op allocates within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)}
        results = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_of(step: Callable[[], Any]) -> int:
    """The bytes that a step allocates at its peak, of which its results are a part."""
    with PeakMemory() as memory:
        results = step()
    del results
    return memory.peak


def allocated_peak(step: Callable[[], Any], device: torch.device) -> int:
    """The bytes that torch's allocator hands out at a step's peak, kernels' own temporaries and results included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return allocated_peaks(step)[0]


def allocated_peaks(step: Callable[[], Any]) -> tuple[int, int]:
    """The same on the CPU, and the peak outside matrix products, whose results count but not their own temporaries.

    Those are up to torch and the machine: a CPU with AVX-512 but without bfloat16 instructions copies the operands and
    results of bfloat16 products in float32.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = step()
    del results
    now = peak = outside = product_ends = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            before, now = now, now + event.nbytes()
            peak = max(peak, now)
            if event.start_ns() > product_ends:
                outside = max(outside, before, now)  # `before`, as a product may have left its result
        elif event.name() in PRODUCTS:
            product_ends = max(product_ends, event.start_ns() + event.duration_ns())
    return peak, max(outside, now)


def linear_step_extra(
    rows: int,
    features: int,
    classes: int,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    normalize: bool = False,
    bias: bool = False,
    memory_budget: int = 0,
) -> int:
    """The bytes beyond inputs, gradients and float32 accumulator of a step of linear_lmf_loss, from fake tensors.

    Nothing is computed, so any size runs in a moment, and any device. The peak is in forward: backward only scales.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(rows, features, dtype=dtype, device=device)
        weight = torch.empty(classes, features, dtype=dtype, device=device)
        b = torch.empty(classes, dtype=dtype, device=device) if bias else None
        target = torch.empty(rows, dtype=torch.int64, device=device)

        def step() -> Any:
            from torch.nn.functional import normalize as normalized

            inputs = normalized(x, dim=1) if normalize else x
            options = Options(1.0, 1.0, 1.5, 30.0, -100, MEAN)
            head = HeadOptions(normalize, backend, memory_budget)
            *_, grad_features, grad_weight, grad_bias = forward_by_chunks(
                None, Classifier(inputs, weight, b), target, Tables(), options, head, 1.0, (True, True, bias)
            )
            return inputs, [grad_features, grad_weight, grad_bias]

        def gradients() -> int:
            accumulators = weight.numel() * (4 if dtype.itemsize == 2 else dtype.itemsize)
            return (
                x.numel() * dtype.itemsize + accumulators + (classes * 4 if bias else 0)
            )  # the bias gradient, before it is rounded

        return peak_of(step) - gradients()
