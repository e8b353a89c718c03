"""The registered ops: what torch asks of a custom op, and what forward hands to backward."""

from __future__ import annotations

import math

import pytest
import torch
from checks import INTERPRETED, accumulated, assert_exact
from oracle import expected

import lmf_kernels  # noqa: F401  (registers the ops)
from lmf_kernels._call import Options, Tables

FUSED = ["triton"] if INTERPRETED else ["native"]
REDUCTION = {"none": 0, "mean": 1, "sum": 2}

pytestmark = pytest.mark.parametrize("fused", FUSED)


def ops(fused):
    return (getattr(torch.ops.lmf_kernels, f"{fused}_{step}").default for step in ("forward", "backward"))


def options_of(reduction):
    return Options(alpha=1.3, beta=0.7, gamma=1.5, s=5.0, ignore_index=-100, reduction=REDUCTION[reduction])


def forward_arguments(z, y, reduction="mean", alpha=1.3, beta=0.7, **tables):
    return z, y, *Tables(**tables), *options_of(reduction)._replace(alpha=alpha, beta=beta)


def batch(dtype=torch.float32, shape=(9, 5)):
    y = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    y.view(-1)[2] = -100
    return torch.randn(shape).to(dtype), y, torch.rand(shape[1]) + 0.1


def test_dtypes_and_shapes_of_the_outputs(fused):
    forward, backward = ops(fused)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for shape in ((9, 5), (4, 5, 3), (3, 5, 2, 2), (0, 5)):
            if math.prod(shape) == 0:
                z, y = torch.randn(shape).to(dtype), torch.zeros(0, dtype=torch.long)
            else:
                z, y, _ = batch(dtype, shape)
            for reduction in REDUCTION:
                arguments = forward_arguments(z, y, reduction)
                loss, saved, denominators = forward(*arguments)
                assert {loss.dtype, saved.dtype, denominators.dtype} == {accumulated(dtype)}
                assert loss.shape == (y.shape if reduction == "none" else ())
                assert saved.shape == (5, y.numel()) and saved.is_contiguous()
                assert denominators.shape == (2 if reduction == "mean" else 0,)
                grad = backward(
                    torch.ones_like(loss), z, y, saved, denominators, *forward_arguments(z, y, reduction)[7:]
                )
                assert grad.dtype == dtype and grad.shape == z.shape


def test_denominators(fused):
    forward, _ = ops(fused)
    z, y, w = batch()
    kept = y[y != -100]
    denominators = forward(*forward_arguments(z, y, ldam_weight=w, focal_weight=w.flip(0)))[2]
    torch.testing.assert_close(denominators, torch.stack([w[kept].sum(), torch.tensor(8.0)]))
    given = dict(ldam_normalizer=torch.tensor(3.0), focal_normalizer=torch.tensor(4.0, dtype=torch.float64))
    assert forward(*forward_arguments(z, y, **given))[2].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("shape", [(9, 5), (4, 5, 3), (3, 5, 2, 2)])
def test_saved_numbers(shape, fused):
    """Rows in the target's order; the weights and coefficients are inside."""
    forward, _ = ops(fused)
    z, y, w = batch(shape=shape)
    tables = dict(margins=torch.rand(5), ldam_weight=w, focal_weight=w.flip(0))
    m, c1, c2, g1, g2 = forward(*forward_arguments(z, y, **tables))[1]
    labels = y.reshape(-1)
    rows = z.movedim(1, -1).reshape(-1, 5).masked_fill(torch.arange(5) == labels[:, None], -torch.inf)
    best, where = rows.max(1)
    kept = labels != -100
    assert torch.equal(m[kept], best[kept])
    for c, g, coefficients in ((c1, g1, dict(alpha=0.0, beta=0.7)), (c2, g2, dict(alpha=1.3, beta=0.0))):
        _, grad = expected(z, y, **tables, **coefficients, s=5.0, reduction="sum")
        grad = grad.movedim(1, -1).reshape(-1, 5)
        assert (c[~kept] == 0).all() and (g[~kept] == 0).all()
        assert_exact(c[kept], grad[kept, where[kept]])  # exp(z_j - m) is 1 there
        assert_exact(g[kept], -grad[kept, labels[kept]])


def test_saved_numbers_of_rows_that_do_not_move_are_zero(fused):
    forward, backward = ops(fused)
    inf, nan = math.inf, math.nan
    z = torch.tensor([[nan, 1.0, 2.0], [1.0, -inf, -inf], [nan, inf, 0.0], [0.0, 1.0, 2.0]])
    y, w = torch.tensor([-100, 0, 2, 1]), torch.tensor([1.0, 1.0, 0.0])
    for reduction in REDUCTION:
        arguments = forward_arguments(z, y, reduction, ldam_weight=w, focal_weight=w)
        loss, saved, denominators = forward(*arguments)
        assert (saved[1:, :3] == 0).all() and (saved[1:, 3] > 0).all()
        for outer in (1.0, inf, nan):  # neither the logits nor the upstream gradient are looked at
            grad = backward(torch.full_like(loss, outer), z, y, saved, denominators, *options_of(reduction))
            assert (grad[:3] == 0).all()


@pytest.mark.parametrize("special, name", [(math.nan, "NaN"), (math.inf, "+inf")])
def test_saved_numbers_of_poisoned_rows_are_nan_for_live_terms_only(special, name, fused):
    forward, _ = ops(fused)
    z = torch.tensor([[0.0, special, 2.0], [0.0, 1.0, 2.0]])
    y, zero = torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 1.0])
    both = forward(*forward_arguments(z, y))[1]
    assert both[1:, 0].isnan().all() and both[1:, 1].isfinite().all()
    focal_only = forward(*forward_arguments(z, y, ldam_weight=zero))[1]
    assert focal_only[[1, 3], 0].isnan().all() and (focal_only[[2, 4], 0] == 0).all()
    ldam_only = forward(*forward_arguments(z, y, focal_weight=zero))[1]
    assert ldam_only[[2, 4], 0].isnan().all() and (ldam_only[[1, 3], 0] == 0).all()


def test_a_term_with_coefficient_zero_saves_zeros(fused):
    forward, _ = ops(fused)
    z, y, _ = batch()
    assert (forward(*forward_arguments(z, y, alpha=0.0))[1][[2, 4]] == 0).all()
    assert (forward(*forward_arguments(z, y, beta=0.0))[1][[1, 3]] == 0).all()


def test_backward_reads_each_terms_own_denominator(fused):
    forward, backward = ops(fused)
    z, y, w = batch()
    _, saved, _ = forward(*forward_arguments(z, y, "sum", ldam_weight=w))
    grad = backward(torch.tensor(2.0), z, y, saved, torch.tensor([3.0, 5.0]), *options_of("mean"))
    want = expected(
        z, y, alpha=1.3, beta=0.7, s=5.0, ldam_weight=w, normalizer=(3.0, 5.0), grad_output=torch.tensor(2.0)
    )
    assert_exact(grad, want[1])


@pytest.mark.parametrize("reduction", list(REDUCTION))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(9, 5), (4, 5, 3)])
def test_opcheck(shape, dtype, reduction, fused):
    """Schema, fake tensors, autograd registration and AOT dispatch; forward with its gradient."""
    forward, backward = ops(fused)
    z, y, w = batch(dtype, shape)
    tables = dict(margins=torch.rand(5), ldam_weight=w, focal_weight=w.double())
    torch.library.opcheck(forward, forward_arguments(z.clone().requires_grad_(), y, reduction, **tables))
    loss, saved, denominators = forward(*forward_arguments(z, y, reduction, **tables))
    torch.library.opcheck(backward, (torch.ones_like(loss), z, y, saved, denominators, *options_of(reduction)))


@pytest.mark.parametrize("reduction", list(REDUCTION))
def test_fake_outputs_lay_out_like_real_ones(reduction, fused):
    forward, backward = ops(fused)
    z = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 5, (2, 4, 3)).transpose(1, 2)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_z, fake_y = mode.from_tensor(z), mode.from_tensor(y)
        fakes = forward(*forward_arguments(fake_z, fake_y, reduction))
        fake_grad = backward(torch.ones_like(fakes[0]), fake_z, fake_y, *fakes[1:], *options_of(reduction))
    reals = forward(*forward_arguments(z, y, reduction))
    grad = backward(torch.ones_like(reals[0]), z, y, *reals[1:], *options_of(reduction))
    for fake, real in zip((*fakes, fake_grad), (*reals, grad), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("reduction", list(REDUCTION))
def test_forward_op_is_differentiable(reduction, fused):
    """For graphs, which hold the raw ops."""
    forward, _ = ops(fused)
    z, y, w = batch()
    z.requires_grad_()
    loss, saved, denominators = forward(*forward_arguments(z, y, reduction, ldam_weight=w))
    outer = torch.rand_like(loss)
    (grad,) = torch.autograd.grad(loss, z, outer)
    options = dict(alpha=1.3, beta=0.7, s=5.0, reduction=reduction, grad_output=outer)
    assert_exact(grad, expected(z, y, ldam_weight=w, **options)[1])
    assert not saved.requires_grad and not denominators.requires_grad
