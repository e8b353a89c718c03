"""Fair measurements on a noisy machine: interleaved rounds, ratios within a round, the copy limit."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lmf_kernels import LMFLoss, lmf_loss
from lmf_kernels._backends import cpu_capability

Loss = Callable[[Tensor, Tensor], Tensor]


class Floor(torch.autograd.Function):
    """What any loss must do: read the logits in forward, read them and write a gradient in backward."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.amax()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return logits * 0.5


def contenders(num_classes: int, device: torch.device, compiled: bool = True, backend: str = "auto") -> dict[str, Loss]:
    """The losses that are compared, by name; LMF with the margins of a long-tailed class distribution."""
    counts = torch.logspace(3, 0, num_classes).ceil()
    fused = LMFLoss(counts, backend=backend).to(device)
    eager = LMFLoss(counts, backend="reference").to(device)
    losses: dict[str, Loss] = {
        "cross_entropy": F.cross_entropy,
        "lmf fused": fused,
        "floor": lambda logits, target: Floor.apply(logits),
        "lmf eager": eager,
    }
    if compiled:
        losses["lmf compiled"] = torch.compile(eager, dynamic=False)
    return losses


def batch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits that require a gradient, and labels."""
    logits = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=device)
    return logits, target


def check(fused: Loss, logits: Tensor, target: Tensor, rows: int = 32) -> None:
    """Compares the fused loss's gradient of the first samples with the float64 reference; raises AssertionError."""
    (grad,) = torch.autograd.grad(fused(logits, target), logits)
    some = logits[:rows].detach().double().requires_grad_()
    options = {"margins": fused.margins, "backend": "reference", "normalizer": float(target.numel())}
    (expected,) = torch.autograd.grad(lmf_loss(some, target[:rows], **options), some)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 1e-2, torch.float16: 2e-3}[logits.dtype]
    smallest = 1e-7 if tolerance > 1e-4 else 1e-30  # where half precision has subnormals
    error = (grad[:rows].double() - expected).abs() / expected.abs().clamp_min(smallest)
    assert error.max() <= tolerance, f"relative error {error.max():.2e} at {tuple(logits.shape)}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """Forward and backward as in training, with the gradient buffer freed as zero_grad(set_to_none=True) does."""
    logits.grad = None
    loss(logits, target).backward()


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, seldom: frozenset[str] = frozenset()
) -> dict[str, list[float]]:
    """Seconds a call of each run in each round, A B C A B C ...; `seldom` runs take part in every third round.

    A run that was left out of a round has no entry for it, so ratios are taken between runs of equal length.
    """
    repeats = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        repeats[name] = max(1, min(200, int(4e-3 / (time.perf_counter() - start))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        for name, run in runs.items():
            if name in seldom and index % 3:
                continue
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of name / base; a seldom run is compared with the rounds that it took part in."""
    numerator, denominator = seconds[name], seconds[base]
    every = -(-len(denominator) // len(numerator))
    return statistics.median(a / b for a, b in zip(numerator, denominator[::every], strict=False))


def copy_bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes a second that a copy between two touched buffers reads and writes."""
    source, destination = torch.ones(2, size // 4, device=device).unbind()
    seconds = interleaved({"copy": lambda: destination.copy_(source)}, device, 7)
    return 2 * size / statistics.median(seconds["copy"])


def machine(device: torch.device) -> str:
    """The hardware and versions that a table was measured with."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = (
            f"{facts.get('model name', 'CPU')}, family {facts.get('cpu family')}, model {facts.get('model')}; "
            f"{torch.get_num_threads()} threads, {cpu_capability()} kernels"
        )
    return f"{name}; torch {torch.__version__}"
