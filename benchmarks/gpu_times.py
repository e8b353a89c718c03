"""Times of forward and backward on a GPU, apart and together, beside other losses and a copy of as many bytes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_cases import (
    DTYPES,
    PASSES,
    Bench,
    Case,
    Loss,
    Run,
    cases,
    check,
    liger,
    losses,
    moved,
    name,
    one_of_each_regime,
    problem,
)
from gpu_rows import one_line
from torch import Tensor

from lmf_kernels import _backends

FIELDS = ("regime", "logits", "dtype", "loss", "pass"), ("ms", "bytes", "GB/s", "error of the gradient")


def times(run: Run) -> None:
    for dtype in DTYPES:
        for case in cases(run.sizes):
            _measure(run, case, dtype, lambda case=case: _beside_others(case, run.device), copies=True)


def compiled(run: Run) -> None:
    """torch.compile of the eager loss: a case of each regime, since each takes seconds to compile."""
    for dtype in DTYPES[:2]:
        for case in one_of_each_regime(run.sizes):
            torch.compiler.reset()
            _measure(run, case, dtype, lambda case=case: _compiled(case, run.device))
    torch.compiler.reset()


def native(run: Run) -> None:
    """The CUDA C++ kernels, where the extension has them."""
    if "native" not in _backends.available_backends(torch.device("cuda")):
        print("native: not measured, the extension has no CUDA kernels here", flush=True)
        return
    for dtype in DTYPES[:2]:
        for case in cases(run.sizes):
            _measure(run, case, dtype, lambda case=case: _native(case, run.device))


def _beside_others(case: Case, device: torch.device) -> dict[str, Loss]:
    found = losses(case.shape[1], device)
    other = liger()
    if len(case.shape) == 2 and other is not None:
        found["liger cross_entropy"] = other
    return found


def _compiled(case: Case, device: torch.device) -> dict[str, Loss]:
    return {"lmf compiled": torch.compile(losses(case.shape[1], device)["lmf eager"], dynamic=False)}


def _native(case: Case, device: torch.device) -> dict[str, Loss]:
    return {"lmf native": losses(case.shape[1], device, "native")["lmf native"]}


def _measure(
    run: Run, case: Case, dtype: torch.dtype, contenders: Callable[[], dict[str, Loss]], copies: bool = False
) -> None:
    def key(loss: str, which: str) -> tuple[object, ...]:
        return case.regime, case, name(dtype), loss, which

    found = contenders()
    fused = [who for who in found if who in ("lmf triton", "lmf native")]
    keys = [key("copy", which) for which in PASSES if copies] + [key(who, "gradient") for who in fused]
    keys += [key(who, which) for who in found for which in _passes(who)]
    missing = run.rows.missing(keys)
    if not missing:
        return
    if run.rows.budget.left() <= 0:
        run.rows.left_out += missing
        return
    try:
        logits, target = problem(case, dtype, run.device)
    except torch.OutOfMemoryError as error:
        for row in missing:
            run.rows.add(row, {"error": one_line(error)})
        return
    size = moved(case, dtype)
    for who in fused:
        run.rows.run(key(who, "gradient"), partial(_checked, found[who], logits, target))
    for which in PASSES if copies else ():
        run.rows.run(key("copy", which), partial(_copied, run, size[which]))
    for who, loss in found.items():
        # Liger writes its gradient over the logits: it must not be given those of the others.
        own = logits.detach().clone().requires_grad_() if who.startswith("liger") else logits
        for which in _passes(who):
            run.rows.run(key(who, which), partial(_timed, run, size[which], which, loss, own, target))
    del logits, target, own
    torch.cuda.empty_cache()


def _passes(who: str) -> Sequence[str]:
    return ("both",) if who.startswith("liger") else PASSES  # Liger computes its gradient in forward


def _checked(fused: Loss, logits: Tensor, target: Tensor) -> dict[str, object]:
    return {"error of the gradient": check(fused, logits, target)}


def _copied(run: Run, size: int) -> dict[str, object]:
    """A copy that reads and writes so many bytes in all: the limit of any kernel that moves them."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=run.device)
    destination = torch.empty_like(source)
    return _row(size, run.bench(lambda: destination.copy_(source)))


def _timed(run: Run, size: int, which: str, loss: Loss, logits: Tensor, target: Tensor) -> dict[str, object]:
    return _row(size, time(run.bench, which, loss, logits, target))


def _row(size: int, milliseconds: float) -> dict[str, object]:
    return {"ms": milliseconds, "bytes": size, "GB/s": size / milliseconds / 1e6}


def time(bench: Bench, which: str, loss: Loss, logits: Tensor, target: Tensor) -> float:
    """Milliseconds, with the gradient's memory freed before each backward as zero_grad(set_to_none=True) does."""

    def forward() -> Tensor:
        logits.grad = None
        return loss(logits, target)

    def backward(result: Any) -> None:
        result.backward()

    def both() -> None:
        forward().backward()

    if which == "forward":
        milliseconds = bench(forward)
    elif which == "backward":
        milliseconds = bench(backward, forward)
    else:
        milliseconds = bench(both)
    logits.grad = None
    return milliseconds
