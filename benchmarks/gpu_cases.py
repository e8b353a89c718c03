"""What is measured on a GPU, how many bytes it has to move, and the timer."""

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_rows import Rows
from torch import Tensor

from lmf_kernels import LMFLoss, lmf_loss

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
PASSES = ("forward", "backward", "both")
TARGET_BYTES, STATISTICS_BYTES = 8, 5 * 4  # of a row; the statistics of these dtypes are float32

Loss = Callable[[Tensor, Tensor], Tensor]


class Sizes(NamedTuple):
    elements: int  # of the logits
    side: int  # of images
    split_rows: int  # few enough for a row to be split over programs: at most two for each multiprocessor
    flush: int  # bytes that are written between two timings, so that the caches hold nothing of the logits


FULL = Sizes(1 << 27, 512, 256, 1 << 28)
QUICK = Sizes(1 << 12, 8, 1, 1 << 10)


class Case(NamedTuple):
    regime: str
    shape: tuple[int, ...]
    layout: str = "contiguous"

    def __str__(self) -> str:
        return str(self.shape) + (f" {self.layout}" if self.layout != "contiguous" else "")


def cases(sizes: Sizes) -> list[Case]:
    """Every regime of docs/gpu.md, and row layouts that take another load."""
    elements, side = sizes.elements, sizes.side
    classes = {"few": (2, 7, 8, 50, 64), "middle": (100, 1000, 1001, 8192), "large": (32000,)}
    found = [Case(regime, (max(1, elements // C), C)) for regime, of_regime in classes.items() for C in of_regime]
    found.append(Case("large, split rows", (sizes.split_rows, 128256)))
    length = max(2, side)
    found.append(Case("large", (max(1, elements // (32000 * length)), 32000, length), "rows of a language model"))
    for C in (2, 5, 21, 150):
        found.append(Case("dense", (max(1, elements // (C * side * side)), C, side, side)))
    batch = max(1, elements // (21 * side * side))
    found.append(Case("dense", (batch, 21, side + 1, side + 1)))
    found.append(Case("few", (batch, 21, side, side), "channels_last"))
    return found


def one_of_each_regime(sizes: Sizes) -> list[Case]:
    every = cases(sizes)
    typical = {"few": 8, "middle": 1000, "large": 32000, "large, split rows": 128256, "dense": 21}
    return [next(c for c in every if c.regime == regime and c.shape[1] == C) for regime, C in typical.items()]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits that require a gradient, and labels."""
    if case.layout == "rows of a language model":  # logits for all tokens but the last, as a loss takes them
        batch, C, length = case.shape
        logits = torch.randn((batch, length + 1, C), device=device, dtype=dtype)[:, :-1].transpose(1, 2)
    else:
        logits = torch.randn(case.shape, device=device, dtype=dtype)
        if case.layout == "channels_last":
            logits = logits.to(memory_format=torch.channels_last)
    target = torch.randint(0, case.shape[1], (case.shape[0], *case.shape[2:]), device=device)
    return logits.requires_grad_(), target


def moved(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that the fused loss reads and writes: logits, gradient, labels and saved statistics."""
    elements = math.prod(case.shape)
    size, rows = elements * dtype.itemsize, elements // case.shape[1]
    forward = size + rows * (TARGET_BYTES + STATISTICS_BYTES)
    backward = 2 * size + rows * (TARGET_BYTES + STATISTICS_BYTES)
    return {"forward": forward, "backward": backward, "both": forward + backward}


@functools.cache
def lmf(num_classes: int, device: torch.device, backend: str) -> LMFLoss:
    """With the margins of a long-tailed class distribution."""
    return LMFLoss(torch.logspace(3, 0, num_classes).ceil(), backend=backend).to(device)


def losses(num_classes: int, device: torch.device, fused: str = "triton") -> dict[str, Loss]:
    return {
        f"lmf {fused}": lmf(num_classes, device, fused),
        "cross_entropy": F.cross_entropy,
        "lmf eager": lmf(num_classes, device, "reference"),
    }


def liger() -> Loss | None:
    """Liger's cross-entropy, if it is installed."""
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    except ImportError:
        return None
    return lambda logits, target: LigerCrossEntropyFunction.apply(logits, target, None)[0]


def check(fused: Any, logits: Tensor, target: Tensor) -> float:
    """The largest relative error of the gradient of the first and last samples, against the float64 reference.

    The gradient is scaled by the number of rows, as a GradScaler would, or float16 would hold none of it.
    """
    scale = torch.full((), float(target.numel()), device=logits.device)
    (gradient,) = torch.autograd.grad(fused(logits, target), logits, scale)
    samples = max(1, min(1024, (1 << 21) // logits[0].numel()))

    def ends(tensor: Tensor) -> Tensor:
        return torch.cat((tensor[:samples], tensor[-samples:])).detach()

    some = ends(logits).double().requires_grad_()
    options = {"margins": fused.margins, "backend": "reference", "normalizer": 1.0}
    (expected,) = torch.autograd.grad(lmf_loss(some, ends(target), **options), some)
    bar = 2e-5 + {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[logits.dtype]  # and half a unit
    floor = 2**-14 if logits.dtype == torch.float16 else 1e-30  # below it float16 is subnormal
    error = ((ends(gradient).double() - expected).abs() / expected.abs().clamp_min(floor)).max().item()
    if not error <= bar:  # or NaN
        raise AssertionError(f"relative error {error:.2e} of the gradient, more than {bar:.2e}")
    return error


class Bench:
    """Milliseconds of a run on the device, the median of many, each after the caches were overwritten."""

    def __init__(self, device: torch.device, flush: int, seconds: float = 0.04) -> None:
        self.device, self.seconds = device, seconds
        self.flush = torch.empty(flush, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[..., object], prepare: Callable[[], Any] | None = None) -> float:
        """`prepare`, if there is one, is called before each run, and not timed; the run gets what it returns."""

        def once() -> tuple[torch.cuda.Event, torch.cuda.Event]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            arguments = () if prepare is None else (prepare(),)
            # While the device writes, the host gets ahead: what is timed does not wait for it.
            self.flush.zero_()
            begin.record()
            run(*arguments)
            end.record()
            return begin, end

        def times(repeats: int) -> list[float]:
            events = [once() for _ in range(repeats)]
            torch.cuda.synchronize(self.device)
            return [begin.elapsed_time(end) for begin, end in events]

        times(2)  # compiles, allocates
        estimate = statistics.median(times(3))
        return statistics.median(times(max(5, min(50, int(1e3 * self.seconds / max(estimate, 1e-3))))))


@dataclass
class Run:
    """What a part of the report works with."""

    rows: Rows
    device: torch.device
    sizes: Sizes

    @functools.cached_property
    def bench(self) -> Bench:
        return Bench(self.device, self.sizes.flush)
