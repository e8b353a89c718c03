"""Confident rows, common offsets and the ends of float32: the bar holds where the textbook composite does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import BAR, accumulated, assert_exact, check
from oracle import expected
from pairwise import pairs

GAMMA = (0.0, 0.5, 1.0, 1.5, 2.0, 5.0)
SCALE = (1.0, 5.0, 30.0, 64.0)
TERMS = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))


def eager(z, y, gamma, s, alpha=1.0, beta=1.0):
    """The textbook composite in the logits' dtype, as the field writes it; without margins."""
    p = F.softmax(z, 1).gather(1, y[:, None]).squeeze(1)
    focal = (1 - p) ** gamma * F.cross_entropy(z, y, reduction="none")
    return alpha * F.cross_entropy(s * z, y, reduction="none") + beta * focal


def confident(gaps, classes, dtype=torch.float32):
    """(len(gaps), classes) rows whose target leads the best competitor by about each gap."""
    z = torch.randn(len(gaps), classes)
    y = torch.randint(0, classes, (len(gaps),))
    z.scatter_(1, y[:, None], -torch.inf)
    z.scatter_(1, y[:, None], z.amax(1, keepdim=True) + torch.tensor(gaps)[:, None])
    return z.to(dtype), y


@pairs(gamma=GAMMA, s=SCALE, terms=TERMS, gaps=((8.0, 12.0, 16.0, 17.5, 20.0), (21.0, 24.0, 32.0, 36.5, 40.0)))
def test_confident_rows(gamma, s, terms, gaps, backend):
    z, y = confident(gaps, 7)
    alpha, beta = terms
    check(z, y, backend, gamma=gamma, s=s, alpha=alpha, beta=beta, reduction="none")
    check(z[:1], y[:1], backend, gamma=gamma, s=s, alpha=alpha, beta=beta)


@pairs(gamma=GAMMA, dtype=(torch.float64, torch.float16, torch.bfloat16))
def test_confident_rows_of_other_dtypes(gamma, dtype, backend):
    gaps = [8.0, 16.0, 24.0, 32.0, 40.0] + [100.0, 300.0] * (dtype == torch.float64)
    z, y = confident(gaps, 9, dtype)
    check(z, y, backend, gamma=gamma, s=1.0, reduction="none")
    scale = torch.full(y.shape, 1e4, dtype=accumulated(dtype))
    check(z, y, backend, scale, gamma=gamma, s=2.0, reduction="none")


@pairs(gamma=GAMMA, s=SCALE, offset=(1e4, -1e4, 3e6))
def test_common_offset(gamma, s, offset, backend):
    z = torch.randn(40, 7) * 3 + offset
    y = torch.randint(0, 7, (40,))
    y[:20] = z[:20].argmax(1)
    check(z, y, backend, gamma=gamma, s=s, margins=torch.rand(7) * 0.5, reduction="none")


@pairs(gamma=GAMMA, classes=(2, 1000))
def test_confident_rows_at_an_offset(gamma, classes, backend):
    z, y = confident([8.0, 16.0, 20.0, 32.0, 40.0], classes)
    check(z + 1e4, y, backend, gamma=gamma, s=1.0, reduction="none")
    check(z - 1e4, y, backend, gamma=gamma, s=30.0, reduction="none")


@pairs(gamma=GAMMA, s=SCALE)
def test_hopeless_rows(gamma, s, backend):
    z, y = confident([-8.0, -16.0, -20.0, -40.0, -88.0, -104.0, -1000.0, -1e6], 7)
    check(z, y, backend, gamma=gamma, s=s, reduction="none")


@pairs(gamma=GAMMA, s=SCALE, classes=(2, 5, 100))
def test_nearly_tied_rows(gamma, s, classes, backend):
    """a and b near zero, from above and below, with margins that cancel the gap."""
    z = 1e-3 * torch.randn(30, classes)
    y = torch.randint(0, classes, (30,))
    margins = torch.linspace(-0.5, 0.5, classes)
    z.scatter_add_(1, y[:, None], margins[y][:, None])
    check(z, y, backend, gamma=gamma, s=s, margins=margins, reduction="none")


@pytest.mark.parametrize("gamma", GAMMA)
def test_ends_of_float32(gamma, backend):
    big = torch.finfo(torch.float32).max
    z = torch.tensor(
        [
            [1e38, -1e38, 0.0],
            [-1e38, 1e38, 0.0],
            [big, -big, 0.0],  # the gap itself overflows
            [-big, big, 0.0],
            [big, big, big],
            [-big, -big, -big],
            [1e-45, 0.0, -1e-45],
            [-big, -torch.inf, -big],
        ]
    )
    check(z, torch.zeros(len(z), dtype=torch.long), backend, gamma=gamma, reduction="none")


def test_textbook_composite_fails_this_bar():
    """The bar is worth having: float32 autograd through the textbook formulas misses it by far."""
    z, y = confident([16.0], 7)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(eager(z, y, gamma=2.0, s=1.0, alpha=0.0).sum(), z)
    with pytest.raises(AssertionError, match="off"):
        assert_exact(grad, expected(z, y, gamma=2.0, s=1.0, alpha=0.0, reduction="sum")[1])


@pairs(gamma=GAMMA, classes=(3, 31, 1000), dtype=(torch.float16, torch.bfloat16))
def test_half_is_as_good_as_eager_float32(dtype, classes, gamma, backend):
    """Error against float64 at most that of the eager composite in float32, rounded to half at the end."""
    z = (2 * torch.randn(64, classes)).to(dtype)
    y = torch.randint(0, classes, (64,))
    loss, grad = check(z, y, backend, gamma=gamma, s=5.0, reduction="sum")
    exact_loss, exact_grad = expected(z, y, gamma=gamma, s=5.0, reduction="sum")
    wide = z.float().requires_grad_()
    eager_loss = eager(wide, y, gamma, 5.0).sum()
    eager_grad = torch.autograd.grad(eager_loss, wide)[0].to(dtype)
    assert (loss - exact_loss).abs() <= (eager_loss - exact_loss).abs() + 2e-6 * exact_loss
    error, eager_error = (grad - exact_grad).abs(), (eager_grad - exact_grad).abs()
    tie = 1e-5 * exact_grad.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error <= eager_error + tie).double().mean() > 0.999  # a tie may round either way
    assert error.norm() <= eager_error.norm() * 1.001


@pytest.mark.parametrize("gamma", GAMMA)
def test_gradient_rows_sum_to_zero(gamma, backend):
    z, y = torch.randn(50, 31) * 4, torch.randint(0, 31, (50,))
    _, grad = check(z, y, backend, gamma=gamma, reduction="sum")
    assert (grad.double().sum(1).abs() <= 1e-6 * grad.double().abs().sum(1)).all()


def test_bar_is_the_specifications():
    assert BAR[torch.float32] == (2e-5, 1e-30)
