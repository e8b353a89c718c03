"""Properties that hold for all inputs, on inputs that hypothesis looks for.

The profiles are in conftest.py: 40 examples of each property in `make test` and 200 in `make test-all`
(HYPOTHESIS_PROFILE=ci), the same ones every time, and 2,500 others in `make nightly` (HYPOTHESIS_PROFILE=nightly).
"""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from checks import BAR, DTYPES, accumulated, assert_exact, check
from hypothesis import assume, given
from oracle import expected
from torch import Tensor

from lmf_kernels import lmf_loss

INF = math.inf
REDUCTIONS = st.sampled_from(("none", "mean", "sum"))
# Finite ones first: hypothesis shrinks towards them. The largest leave room for s and weights in float32, or (FINITE)
# for differences alone.
SPECIAL = (0.0, -0.0, 1.0, 30.0, -30.0, 1e4, -1e4, 1e34, -1e34, 1e-40, -1e-40, 1e-45, -INF, INF, math.nan)
FINITE = (*(value for value in SPECIAL if math.isfinite(value)), 1.5e38, -1.5e38)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


@st.composite
def shapes(draw: st.DrawFn, min_classes: int = 1) -> tuple[int, ...]:
    """(C,), (N, C) or (N, C, d1, ..., dk); C also beyond the widths of vectors and tiles."""
    classes = draw(st.one_of(st.integers(min_classes, 9), st.sampled_from((15, 16, 17, 33, 64, 65, 129, 200))))
    rows = draw(st.integers(0, 40 if classes < 10 else 4))
    inner = draw(st.lists(st.integers(0, 4), max_size=3)) if rows < 5 and classes < 40 else []
    return draw(st.sampled_from(((rows, classes, *inner), (rows, classes, *inner), (classes,))))


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def classes_of(t: Tensor) -> int:
    return t.shape[0] if t.dim() == 1 else t.shape[1]


@st.composite
def strided(draw: st.DrawFn, values: Tensor) -> Tensor:
    """The values in memory of any order of dimensions, with gaps, an offset or expanded dimensions."""
    shape = values.shape
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in shape]
    expanded = [d for d in range(len(shape)) if shape[d] and draw(st.integers(0, 9)) == 9]
    offset = draw(st.sampled_from((0, 0, 1, 3)))
    for d in expanded:
        values = values.narrow(d, 0, 1)
    strides, size = [0] * len(shape), 1
    for d in order:
        strides[d] = size * steps[d]
        size *= max(1, (values.shape[d] - 1) * steps[d] + 1)
    memory = torch.full((offset + size,), math.nan, dtype=values.dtype)
    return memory.as_strided(values.shape, strides, offset).copy_(values).expand(shape)


@st.composite
def logits(
    draw: st.DrawFn,
    special: tuple[float, ...] = SPECIAL,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    min_classes: int = 1,
) -> Tensor:
    """Noise of any size around any offset, with special values at a few places."""
    shape, dtype = draw(shapes(min_classes)), draw(st.sampled_from(dtypes))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    scale = draw(st.sampled_from((1.0, 0.0, 10.0, 100.0, 1e-3, 1e4, 1e-39)))
    values = noise * scale + draw(st.sampled_from((0.0, -7.0, 1e3)))
    if values.numel():
        places = st.tuples(st.integers(0, values.numel() - 1), st.sampled_from(special))
        for place, value in draw(st.lists(places, max_size=6)):
            values.view(-1)[place] = value
    z = draw(strided(values.to(dtype)))
    assume(special is SPECIAL or bool(z.isfinite().all()))  # halves overflow
    return z


@st.composite
def labels(draw: st.DrawFn, z: Tensor, ignore_index: int = -100, ignored: bool = True) -> Tensor:
    shape, classes = rows_of(tuple(z.shape)), classes_of(z)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    target = torch.randint(0, classes, shape, generator=generator)
    if ignored and target.numel():
        for place in draw(st.lists(st.integers(0, target.numel() - 1), max_size=3)):
            target.view(-1)[place] = ignore_index
    return target


@st.composite
def tables(draw: st.DrawFn, classes: int, low: float, high: float) -> Tensor | None:
    """None, or (C,) in some dtype, between bounds, with a zero now and then."""
    if draw(st.booleans()):
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    table = low + (high - low) * torch.rand(classes, generator=generator)
    if draw(st.booleans()):
        table[draw(st.integers(0, classes - 1))] = 0.0
    return table.to(draw(st.sampled_from(DTYPES)))


@st.composite
def hyper_parameters(draw: st.DrawFn) -> dict[str, float]:
    usual = {"alpha": (1.0, 0.0), "beta": (1.0, 0.0), "gamma": (0.0, 0.5, 1.0, 1.5, 2.0, 5.0), "s": (1.0, 30.0, 64.0)}
    # Coefficients are 0 or well inside float32: test_reductions.py has those below.
    bounds = {"alpha": (1e-6, 10.0), "beta": (1e-6, 10.0), "gamma": (0.0, 5.0), "s": (0.01, 64.0)}
    return {name: draw(st.one_of(st.sampled_from(usual[name]), numbers(*bounds[name]))) for name in usual}


def of_rows(z: Tensor) -> Tensor:
    """(rows, C) as float64."""
    z = z if z.dim() == 1 else z.movedim(1, -1)
    return z.double().reshape(-1, z.shape[-1]) if z.numel() else z.new_zeros((0, 1)).double()


def loss_and_gradient(
    z: Tensor, y: Tensor, backend: str, outer: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    loss = lmf_loss(z, y, backend=backend, **options)
    (grad,) = torch.autograd.grad(loss, z, torch.ones_like(loss) if outer is None else outer)
    return loss.detach(), grad


@given(st.data())
def test_values_and_gradients_are_those_of_the_oracle(backend, data):
    """Any shape, strides, dtype, options and logits, special ones included."""
    z = data.draw(logits())
    classes = classes_of(z)
    options = data.draw(hyper_parameters())
    options["ignore_index"] = data.draw(st.sampled_from((-100, 255, -1, 0)))
    y = data.draw(labels(z, options["ignore_index"]))
    options["reduction"] = data.draw(REDUCTIONS)
    options["margins"] = data.draw(tables(classes, -1.0, 1.0))
    if data.draw(st.booleans()):
        options["weight"] = data.draw(tables(classes, 0.1, 3.0))
    else:
        options["ldam_weight"] = data.draw(tables(classes, 0.1, 3.0))
        options["focal_weight"] = data.draw(tables(classes, 0.1, 3.0))
    outer = None
    acc = accumulated(z.dtype)
    if data.draw(st.booleans()):
        seed = data.draw(st.integers(0, 2**31))
        outer = torch.randn(
            y.shape if options["reduction"] == "none" else (), dtype=acc, generator=torch.Generator().manual_seed(seed)
        )
    if options["reduction"] == "mean" and data.draw(st.booleans()):
        value = numbers(0.5, 1e6)
        options["normalizer"] = data.draw(st.one_of(value, value.map(torch.tensor), st.tuples(value, value)))
    check(z, y, backend, outer, **options)


@given(st.data())
def test_a_constant_added_to_a_row_changes_no_bit(backend, data):
    """Sixteenths of small numbers: then the sums are exact, and only differences of logits may count."""
    shape = data.draw(shapes())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    z = torch.randint(-300, 300, shape, generator=generator).to(dtype) / 16
    rows = (*shape[:1], 1, *shape[2:]) if len(shape) > 1 else (1,)
    shifted = z + torch.randint(-(2**15), 2**15, rows, generator=generator).to(dtype)
    y, options = data.draw(labels(z)), data.draw(hyper_parameters())
    options["reduction"] = data.draw(REDUCTIONS)
    for one, other in zip(*(loss_and_gradient(x, y, backend, **options) for x in (z, shifted)), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@given(st.data())
def test_classes_may_be_numbered_in_any_order(backend, data):
    """With their margins and weights, and a gradient that moves with them."""
    z = data.draw(logits())
    y, options, classes = data.draw(labels(z)), data.draw(hyper_parameters()), classes_of(z)
    options["reduction"] = data.draw(REDUCTIONS)
    vectors = {name: data.draw(tables(classes, 0.1, 1.0)) for name in ("margins", "ldam_weight", "focal_weight")}
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))))
    moved = {name: None if vector is None else vector[order] for name, vector in vectors.items()}
    dim = 0 if z.dim() == 1 else 1
    y_moved = torch.where(y < 0, y, order.argsort()[y.clamp_min(0)])
    loss, grad = loss_and_gradient(z, y, backend, **options, **vectors)
    got_loss, got_grad = loss_and_gradient(z.index_select(dim, order), y_moved, backend, **options, **moved)
    for got, want in ((got_loss, loss), (got_grad, grad.index_select(dim, order))):
        relative, floor = BAR[accumulated(z.dtype)]
        relative = 2 * max(relative, torch.finfo(got.dtype).eps)
        torch.testing.assert_close(
            got, want, rtol=relative, atol=max(floor, torch.finfo(got.dtype).tiny), equal_nan=True
        )


@given(st.data())
def test_gradient_rows_sum_to_zero(backend, data):
    z = data.draw(logits(FINITE))
    y, options = data.draw(labels(z)), data.draw(hyper_parameters())
    _, grad = loss_and_gradient(
        z, y, backend, reduction="sum", margins=data.draw(tables(classes_of(z), -1.0, 1.0)), **options
    )
    rows = of_rows(grad)
    info = torch.finfo(grad.dtype)
    allowed = rows.abs().sum(1) * max(info.eps, BAR[accumulated(z.dtype)][0])
    assert (rows.sum(1).abs() <= allowed + classes_of(z) * max(info.smallest_normal, 1e-30)).all()


@given(st.data())
def test_loss_is_not_negative_and_moves_away_from_the_target(backend, data):
    """And so the gradient is at most 0 at the target, at least 0 elsewhere."""
    z = data.draw(logits(FINITE))
    y, options = data.draw(labels(z)), data.draw(hyper_parameters())
    margins, weight = data.draw(tables(classes_of(z), -1.0, 1.0)), data.draw(tables(classes_of(z), 0.1, 3.0))
    loss, grad = loss_and_gradient(z, y, backend, reduction="none", margins=margins, weight=weight, **options)
    assert (loss >= 0).all()
    rows, kept = of_rows(grad), y.reshape(-1) >= 0
    own = torch.zeros_like(rows, dtype=torch.bool)
    own[kept, y.reshape(-1)[kept]] = True
    assert (rows[own] <= 0).all() and (rows[~own] >= 0).all()


@given(st.data())
def test_ldam_of_scale_one_without_margins_is_cross_entropy(backend, data):
    z = data.draw(logits((0.0, 9.0, -9.0, 12.5), (torch.float32, torch.float64), min_classes=2))
    assume(bool((z.amax() - z.amin() < 30).all()) if z.numel() else True)  # F.cross_entropy loses confident rows
    ignore_index = data.draw(st.sampled_from((-100, 0, 1)))
    y, weight, reduction = (
        data.draw(labels(z, ignore_index)),
        data.draw(tables(classes_of(z), 0.1, 3.0)),
        data.draw(REDUCTIONS),
    )
    margins = data.draw(st.sampled_from((None, torch.zeros(classes_of(z)))))
    got = loss_and_gradient(
        z, y, backend, s=1.0, beta=0.0, weight=weight, margins=margins, ignore_index=ignore_index, reduction=reduction
    )
    hold_against_cross_entropy(z, y, got, weight, ignore_index, reduction)


@given(st.data())
def test_focal_loss_of_gamma_zero_is_cross_entropy(backend, data):
    z = data.draw(logits((0.0, 9.0, -9.0, 12.5), (torch.float32, torch.float64), min_classes=2))
    assume(bool((z.amax() - z.amin() < 30).all()) if z.numel() else True)
    reduction = data.draw(REDUCTIONS)
    y = data.draw(labels(z))
    weight = None if reduction == "mean" else data.draw(tables(classes_of(z), 0.1, 3.0))  # another denominator
    got = loss_and_gradient(z, y, backend, alpha=0.0, gamma=0.0, weight=weight, reduction=reduction)
    hold_against_cross_entropy(z, y, got, weight, -100, reduction)


def hold_against_cross_entropy(z, y, got, weight, ignore_index, reduction):
    """In float64, whose cancellation stays below the bar for these logits."""
    exact = z.double().detach().requires_grad_()
    loss = F.cross_entropy(
        exact, y, None if weight is None else weight.double(), ignore_index=ignore_index, reduction=reduction
    )
    (grad,) = torch.autograd.grad(loss, exact, torch.ones_like(loss))
    if loss.isnan().any():  # no kept row: the gradient is 0 here, NaN there
        grad = torch.zeros_like(grad)
    for value, want in zip(got, (loss.detach(), grad), strict=True):
        torch.testing.assert_close(value.double(), want, rtol=2e-5, atol=1e-14, equal_nan=True)


@given(st.data())
def test_rows_do_not_know_each_other(backend, data):
    """A row's loss and gradient are the same whatever else is in the batch: NaN, other rows, none at all."""
    z = data.draw(logits())
    assume(z.dim() == 2 and z.shape[0] > 1)
    y, options = data.draw(labels(z)), data.draw(hyper_parameters())
    loss, grad = loss_and_gradient(z, y, backend, reduction="none", **options)
    row = data.draw(st.integers(0, z.shape[0] - 1))
    exact = expected(z[row : row + 1], y[row : row + 1], reduction="none", **options)
    assert_exact(loss[row : row + 1], exact[0], "loss")
    assert_exact(grad[row : row + 1], exact[1], "gradient")
