"""The reductions: each term has its own denominator, `normalizer` replaces both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import assert_exact, check
from oracle import expected

from lmf_kernels import lmf_loss


@pytest.fixture
def batch():
    """Float64 logits (12, 5), labels of which some are -100, positive class weights."""
    target = torch.randint(0, 5, (12,))
    target[[3, 7]] = -100
    return torch.randn(12, 5, dtype=torch.float64), target, torch.rand(5, dtype=torch.float64) + 0.2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_unscaled_ldam_without_margins_is_cross_entropy(batch, reduction, ignore_index, weighted, backend):
    z, y, w = batch
    w = w if weighted else None
    y = y.where(y >= 0, ignore_index)
    loss = lmf_loss(z, y, s=1.0, beta=0.0, weight=w, ignore_index=ignore_index, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(z, y, w, ignore_index=ignore_index, reduction=reduction))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_focal_with_gamma_zero_is_cross_entropy_over_the_row_count(batch, reduction, weighted, backend):
    z, y, w = batch
    w = w if weighted else None
    loss = lmf_loss(z, y, alpha=0.0, gamma=0.0, weight=w, reduction=reduction, backend=backend)
    if reduction == "mean":  # ten of twelve rows are kept; their weights do not divide
        want = F.cross_entropy(z, y, w, reduction="sum") / 10
    else:
        want = F.cross_entropy(z, y, w, reduction=reduction)
    torch.testing.assert_close(loss, want)


def test_mean_by_hand(batch, backend):
    z, y, w = batch
    focal_w = w.flip(0)
    options = dict(ldam_weight=w, focal_weight=focal_w, alpha=1.5, beta=0.5, gamma=2.0, s=5.0)
    rows = lmf_loss(z, y, **{**options, "beta": 0.0}, reduction="none", backend=backend)
    focal = lmf_loss(z, y, **{**options, "alpha": 0.0}, reduction="none", backend=backend)
    kept = y != -100
    want = rows.sum() / w[y[kept]].sum() + focal.sum() / kept.sum()
    torch.testing.assert_close(lmf_loss(z, y, **options, backend=backend), want)
    total = lmf_loss(z, y, **options, reduction="sum", backend=backend)
    torch.testing.assert_close(total, (rows + focal).sum())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_all_rows_ignored(rows, reduction, backend):
    target = torch.full((rows,), -100)
    loss, grad = check(torch.randn(rows, 4), target, backend, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (0, 1)])
def test_no_rows(shape, backend):
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    z = torch.randn(shape)
    assert check(z, target, backend)[0].isnan()
    assert check(z, target, backend, reduction="sum")[0] == 0
    assert check(z, target, backend, reduction="none")[0].shape == target.shape


def test_weight_sum_zero(backend):
    z, y, weight = torch.randn(3, 4), torch.tensor([1, 1, 1]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss, grad = check(z, y, backend, weight=weight)
    assert loss.isnan() and (grad == 0).all()
    assert check(z, y, backend, weight=weight, beta=0.0)[0].isnan()
    assert check(z, y, backend, weight=weight, alpha=0.0)[0] == 0  # over three kept rows
    # A term that is not evaluated has no denominator either.
    assert check(z, y, backend, ldam_weight=weight, alpha=0.0)[0].isfinite()


def test_weight_sum_zero_of_one_term_leaves_the_other_terms_gradient(backend):
    z, y, weight = torch.randn(3, 4), torch.tensor([1, 1, 1]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss, grad = check(z, y, backend, ldam_weight=weight)
    assert loss.isnan() and (grad != 0).all()


def test_none_keeps_the_shape_of_the_target(backend):
    for shape in ((), (4,), (4, 2), (4, 2, 3), (4, 2, 3, 2)):
        z = torch.randn((shape[0], 5, *shape[1:]) if shape else (5,))
        loss, _ = check(z, torch.randint(0, 5, shape), backend, reduction="none")
        assert loss.shape == shape


def _normalizers():
    return {
        "float": 7.3,
        "int": 7,
        "tensor": torch.tensor(7.5),
        "float64": torch.tensor(7.5, dtype=torch.float64),
        "pair": (7.3, 3.3),
        "tensors": (torch.tensor(7.5), torch.tensor(3.25)),
        "mixed": (torch.tensor(7.5), 3.3),
        "count": torch.tensor(7),
    }


@pytest.mark.parametrize("name", list(_normalizers()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalizer_replaces_both_denominators(name, dtype, backend):
    z, y = torch.randn(9, 4).to(dtype), torch.randint(0, 4, (9,))
    y[2] = -100
    check(z, y, backend, torch.tensor(3.0), weight=torch.rand(4) + 0.1, normalizer=_normalizers()[name])


@pytest.mark.parametrize("name", ["float", "tensor", "pair", "tensors"])
def test_normalizer_without_kept_rows_gives_zero(name, backend):
    y = torch.full((3,), -100)
    loss, grad = check(torch.randn(3, 4), y, backend, normalizer=_normalizers()[name])
    assert loss == 0 and (grad == 0).all()


def test_normalizer_is_read_when_the_loss_is_computed(backend):
    z, y, normalizer = torch.randn(9, 4), torch.randint(0, 4, (9,)), torch.tensor(2.0)
    before = lmf_loss(z, y, normalizer=normalizer, backend=backend)
    normalizer.fill_(4.0)
    torch.testing.assert_close(lmf_loss(z, y, normalizer=normalizer, backend=backend), before / 2)


def test_changing_the_inputs_after_forward_does_not_change_backward(backend):
    """Weights, margins and normalizer enter the saved statistics; kernels never see later values."""
    z, y = torch.randn(9, 4, requires_grad=True), torch.randint(0, 4, (9,))
    given = dict(
        margins=torch.rand(4), ldam_weight=torch.rand(4), focal_weight=torch.rand(4), normalizer=torch.tensor(3.0)
    )
    if backend == "reference":  # eager autograd refuses a changed normalizer with an error of its own
        del given["normalizer"]
    want = expected(z, y, **{name: value.clone() for name, value in given.items()})[1]
    loss = lmf_loss(z, y, **given, backend=backend)
    for value in given.values():
        value.mul_(100)
    assert_exact(torch.autograd.grad(loss, z)[0], want)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 10, 1), (0, 7, 5)])
def test_gradient_accumulation_with_a_global_normalizer_equals_one_batch(sizes, backend):
    z, y, w = torch.randn(12, 5), torch.randint(0, 5, (12,)), torch.rand(5) + 0.2
    y[[0, 1, 2, 3]] = torch.tensor([-100, 2, -100, -100])
    kept = y[y != -100]
    normalizer = (w[kept].sum(), torch.tensor(float(kept.numel())))
    whole, whole_grad = check(z, y, backend, weight=w)
    parts = [
        check(part, labels, backend, weight=w, normalizer=normalizer)
        for part, labels in zip(z.split(sizes), y.split(sizes), strict=True)
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole_grad)


def test_half_mean_does_not_overflow(backend):
    # 600 rows of loss near 60 * 30 sum to a million, far beyond float16
    z = torch.zeros(10, 3, 60, dtype=torch.float16)
    z[:, 0] = 60.0
    loss, _ = check(z, torch.ones(10, 60, dtype=torch.long), backend)
    assert loss.isfinite()


def test_many_rows_sum_accurately(backend):
    """A plain float32 running sum of this many equal losses drifts past the bar."""
    rows = 3_000 if backend == "triton" else 3_000_000
    z = torch.tensor([[0.1, 0.2]]).expand(rows, 2)
    loss = lmf_loss(z, torch.zeros(rows, dtype=torch.long), reduction="sum", backend=backend)
    one, _ = expected(z[:1], torch.zeros(1, dtype=torch.long), reduction="sum")
    assert_exact(loss, one * rows)


@pytest.mark.parametrize("coefficients", [(1e-203, 1.0), (1.0, 1e-203), (1e-203, 0.0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_coefficient_below_float32(coefficients, reduction, backend):
    """Kernels compute in float32, where it is 0 and its term not evaluated: its denominator must not count either."""
    z, y = torch.randn(9, 4), torch.randint(0, 4, (9,))
    check(z, y, backend, alpha=coefficients[0], beta=coefficients[1], reduction=reduction, s=1.0)
