"""The precision bar of the specification, and the one call that holds a backend against the oracle."""

from __future__ import annotations

import os
from typing import Any

import torch
from oracle import expected
from torch import Tensor

from lmf_kernels import lmf_loss

# The interpreter is chosen when Triton is imported, so its backend has a process to itself.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = os.environ.get("LMF_TEST_BACKENDS", "triton" if INTERPRETED else "reference,native").split(",")

# Accumulation dtype -> the relative error allowed for every element whose exact magnitude is at least the floor, and
# that floor, which bounds the error of all smaller elements (they or the products behind them may underflow).
BAR = {torch.float32: (2e-5, 1e-30), torch.float64: (1e-10, 1e-280)}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The loss dtype for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_exact(actual: Tensor, exact: Tensor, what: str = "") -> None:
    """Hold every element against the precision bar; NaN and infinities must be in the same places.

    Half tensors may add half a unit in the last place, the rounding of a result that meets the float32 bar.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    relative, floor = BAR[accumulated(actual.dtype)]
    got = actual.detach().double()
    limit = torch.where(exact.abs() >= floor, relative * exact.abs(), floor)
    if actual.dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(actual.dtype)
        limit = limit + (exact.abs() * (0.5 * info.eps)).clamp_min(0.5 * info.smallest_normal * info.eps)
    rounded = exact.to(actual.dtype).double()  # overflows where the dtype does
    special = ~(rounded.isfinite() & got.isfinite())
    wrong = torch.where(special, ~torch.isclose(got, rounded, rtol=0, equal_nan=True), (got - exact).abs() > limit)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements off; at {at} got {got[at].item():.9e}, exactly "
            f"{exact[at].item():.9e}, error {abs(got[at] - exact[at]).item():.2e}, allowed {limit[at].item():.2e}"
        )


def _strides(tensor: Tensor) -> list[int]:
    """The strides that address anything."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


def check(
    logits: Tensor, target: Tensor, backend: str, grad_output: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compare loss and gradient with the oracle, dtypes and layout with the contract; return both."""
    z = logits.detach().requires_grad_()
    before = z.detach().clone()
    loss = lmf_loss(z, target, backend=backend, **options)
    outer = torch.ones_like(loss) if grad_output is None else grad_output
    (grad,) = torch.autograd.grad(loss, z, outer)

    exact_loss, exact_grad = expected(logits, target, grad_output=grad_output, **options)
    assert loss.dtype == accumulated(logits.dtype), loss.dtype
    assert grad.dtype == logits.dtype, grad.dtype
    if backend != "reference":  # eager autograd lays gradients out as it likes
        assert _strides(grad) == _strides(torch.empty_like(logits)), (grad.stride(), logits.stride())
    assert torch.equal(z.detach().nan_to_num(), before.nan_to_num()), "the logits were overwritten"
    assert_exact(loss, exact_loss, "loss")
    assert_exact(grad, exact_grad, "gradient")
    return loss.detach(), grad
