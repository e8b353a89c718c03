"""The eager reference itself: its own functions, poisoning instead of raising, and what fused backends rely on."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from checks import assert_exact
from oracle import expected

from lmf_kernels import lmf_loss
from lmf_kernels._call import Options, Tables
from lmf_kernels.math.reference import reference_loss
from lmf_kernels.math.rows import focal_value, softplus

GRID = [-700.0, -300.0, -100.0, -40.0, -20.0, -5.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 5.0, 20.0, 40.0, 100.0, 300.0, 700.0]


def derivatives(function, x):
    """The values of a function and its first two derivatives at the points x."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = function(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return value.detach(), first.detach(), second


def compare(actual, exact_function, points):
    for order, values in enumerate(actual):
        with mpmath.workdps(60):
            exact = [float(mpmath.diff(exact_function, mpmath.mpf(x), order)) for x in points]
        torch.testing.assert_close(values, torch.tensor(exact, dtype=torch.float64), rtol=1e-10, atol=1e-25)


def test_softplus_and_its_derivatives():
    compare(derivatives(softplus, GRID), lambda x: mpmath.log1p(mpmath.exp(x)), GRID)
    tiny = softplus(torch.tensor([-80.0, -40.0]))  # float32 keeps its relative precision
    torch.testing.assert_close(tiny.double(), torch.tensor([-80.0, -40.0]).double().exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0, 5.0])
def test_focal_of_log_odds_and_its_derivatives(gamma):
    def exact(a):
        odds = mpmath.exp(a)
        return (odds / (1 + odds)) ** gamma * mpmath.log1p(odds)

    compare(derivatives(lambda a: focal_value(a, gamma), GRID), exact, GRID)


def test_focal_of_infinite_log_odds():
    value, first, second = derivatives(lambda a: focal_value(a, 2.0), [math.inf])
    assert (value.item(), first.item(), second.item()) == (math.inf, 1.0, 0.0)


@pytest.mark.parametrize("reduction, code", [("none", 0), ("mean", 1), ("sum", 2)])
def test_bad_labels_poison_their_row(reduction, code):
    z, y = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 4, -100, -1, 3])
    w = torch.rand(4) + 0.1
    loss = reference_loss(z, y, Tables(None, w, w), Options(1.0, 1.0, 1.5, 30.0, -100, code))
    (grad,) = torch.autograd.grad(loss, z, torch.ones_like(loss))
    want_loss, want_grad = expected(z, y, weight=w, reduction=reduction)
    assert_exact(loss.detach(), want_loss)
    assert_exact(grad, want_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype, backend):
    z, y = torch.randn(6, 5), torch.randint(0, 5, (6,))
    for logits in (z, z.to(dtype)):
        logits.requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            loss = lmf_loss(logits, y, backend=backend)
        (grad,) = torch.autograd.grad(loss, logits)
        plain = lmf_loss(logits, y, backend=backend)
        assert loss.dtype == torch.float32 and grad.dtype == logits.dtype
        assert torch.equal(loss, plain) and torch.equal(grad, torch.autograd.grad(plain, logits)[0])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_meta_tensors_use_the_reference(reduction):
    z = torch.randn(6, 5, 2, device="meta", requires_grad=True)
    y = torch.zeros(6, 2, dtype=torch.long, device="meta")
    loss = lmf_loss(z, y, reduction=reduction)
    assert loss.shape == ((6, 2) if reduction == "none" else ()) and loss.device.type == "meta"


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_second_derivative_at_ties(gamma):
    """max and |.| have kinks where all logits are equal; the loss has none."""
    z, y = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1])
    assert torch.autograd.gradgradcheck(
        lambda z: lmf_loss(z, y, s=1.0, gamma=gamma, reduction="none", backend="reference"), z
    )
