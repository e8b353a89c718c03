"""Autograd: gradients of both orders, upstream gradients of every kind, graphs used twice, nothing overwritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import INTERPRETED, assert_exact, check
from oracle import expected
from pairwise import pairs

from lmf_kernels import lmf_loss

REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
FACTORS = dict(
    gamma=(0.0, 0.5, 1.0, 1.5, 2.0, 5.0),
    terms=((1.3, 0.7), (1.3, 0.0), (0.0, 0.7)),
    reduction=("none", "mean", "sum"),
)


def problem(rows=5, classes=4, dtype=torch.float64):
    """Logits that require grad, labels with one ignored row, and options with margins and both weights."""
    z = torch.randn(rows, classes, dtype=dtype, requires_grad=True)
    y = torch.randint(0, classes, (rows,))
    y[1] = -100
    options = dict(
        margins=torch.rand(classes, dtype=dtype),
        ldam_weight=torch.rand(classes, dtype=dtype) + 0.1,
        focal_weight=torch.rand(classes, dtype=dtype) + 0.1,
        s=2.0,
    )
    return z, y, options


@pairs(**FACTORS)
def test_gradcheck(gamma, terms, reduction, backend):
    z, y, options = problem()
    options |= dict(gamma=gamma, alpha=terms[0], beta=terms[1], reduction=reduction, backend=backend)
    assert torch.autograd.gradcheck(lambda z: lmf_loss(z, y, **options), z, fast_mode=INTERPRETED)


@pytest.mark.parametrize("shape", [(4,), (3, 4, 2), (2, 4, 2, 2), (3, 1)])
def test_gradcheck_of_other_shapes(shape, backend):
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    classes = shape[0] if len(shape) == 1 else shape[1]
    y = torch.randint(0, classes, (() if len(shape) == 1 else (shape[0], *shape[2:])))
    assert torch.autograd.gradcheck(
        lambda z: lmf_loss(z, y, s=2.0, reduction="none", backend=backend), z, fast_mode=INTERPRETED
    )


@pairs(**FACTORS)
def test_gradgradcheck(gamma, terms, reduction, backend):
    z, y, options = problem(3, 3)
    options |= dict(gamma=gamma, alpha=terms[0], beta=terms[1], reduction=reduction, backend=backend)
    assert torch.autograd.gradgradcheck(lambda z: lmf_loss(z, y, **options), z, fast_mode=INTERPRETED)


def test_second_derivative_of_a_confident_row(backend):
    """Of two logits a gap g apart, focal loss is f(-g); its second derivative is (1 + gamma)^2 f far out."""
    z = torch.tensor([[25.0, 0.0]], requires_grad=True)
    y = torch.tensor([0])
    loss = lmf_loss(z, y, alpha=0.0, gamma=0.5, reduction="sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    exact_loss, exact_grad = expected(z, y, alpha=0.0, gamma=0.5, reduction="sum")
    assert_exact(grad.detach(), exact_grad)
    (second,) = torch.autograd.grad(grad[0, 1], z)
    want = 1.5**2 * exact_loss.item()
    torch.testing.assert_close(second.double().tolist(), [[-want, want]], rtol=1e-4, atol=0.0)


def test_create_graph_keeps_the_first_derivative(backend):
    z, y, options = problem(33, 9, torch.float32)
    (plain,) = torch.autograd.grad(lmf_loss(z, y, **options, backend=backend), z)
    (graphed,) = torch.autograd.grad(lmf_loss(z, y, **options, backend=backend), z, create_graph=True)
    assert torch.equal(plain, graphed)


def test_gradient_penalty(backend):
    """A loss on the gradient: derivative of |dL/dz|^2 against central differences of the oracle's gradient."""
    z, y, options = problem(4, 3)
    (grad,) = torch.autograd.grad(lmf_loss(z, y, **options, backend=backend), z, create_graph=True)
    (got,) = torch.autograd.grad(grad.square().sum(), z)
    step = 1e-5
    want = torch.zeros_like(got)
    for i in range(z.numel()):
        shift = F.one_hot(torch.tensor(i), z.numel()).view_as(z) * step
        ends = [expected(z.detach() + sign * shift, y, **options)[1].square().sum() for sign in (1, -1)]
        want.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("how", ["sum", "mean", "expanded", "transposed", "sliced", "row", "column"])
def test_upstream_gradient_of_any_strides(how, backend):
    """Autograd hands over expanded and strided gradients; reading them as contiguous gives wrong rows."""
    shape = (6, 4)
    outer = {
        "sum": torch.ones(()).expand(shape),
        "mean": torch.full((), 1 / 24).expand(shape),
        "expanded": torch.tensor(2.5).expand(shape),
        "transposed": torch.randn(4, 6).t(),
        "sliced": torch.randn(12, 9)[::2, 1::2],
        "row": torch.randn(1, 4).expand(shape),
        "column": torch.randn(6, 1).expand(shape),
    }[how]
    z, y = torch.randn(6, 5, 4), torch.randint(0, 5, shape)
    check(z, y, backend, outer, reduction="none")


def test_reducing_after_none_equals_reducing_inside(backend):
    z, y = torch.randn(33, 9, requires_grad=True), torch.randint(0, 9, (33,))
    for weights in (torch.ones(33), torch.rand(33), torch.zeros(33)):
        loss = (lmf_loss(z, y, reduction="none", backend=backend) * weights).sum()
        (grad,) = torch.autograd.grad(loss, z)
        exact_loss, exact_grad = expected(z, y, reduction="none", grad_output=weights)
        assert_exact(grad, exact_grad)
        assert_exact(loss.detach(), (exact_loss * weights).sum())


@REDUCTIONS
@pytest.mark.parametrize("scale", [0.0, -1.0, 65536.0, 1e-10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaled_upstream_gradient(dtype, scale, reduction, backend):
    z, y = torch.randn(7, 5).to(dtype), torch.randint(0, 5, (7,))
    outer = torch.full((7,) if reduction == "none" else (), scale)
    check(z, y, backend, outer, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_overwritten(dtype, backend):
    z, y, options = problem(33, 9, torch.float32)
    z = z.detach().to(dtype).requires_grad_()
    outer = torch.randn(33)
    tensors = [z, y, outer, options["margins"], options["ldam_weight"], options["focal_weight"]]
    copies, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    loss = lmf_loss(z, y, **options, reduction="none", backend=backend)
    kept = loss.detach().clone()
    (first,) = torch.autograd.grad(loss, z, outer, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z, outer)
    assert torch.equal(first, second)
    assert first.data_ptr() not in {t.data_ptr() for t in (*tensors, second)}
    assert torch.equal(loss, kept)
    for tensor, copy, version in zip(tensors, copies, versions, strict=True):
        assert torch.equal(tensor, copy) and tensor._version == version


def test_two_losses_and_another_use_of_the_same_logits(backend):
    z, y = torch.randn(8, 5, requires_grad=True), torch.randint(0, 5, (8,))
    (lmf_loss(z, y, backend=backend) + 2 * lmf_loss(z, y.roll(1), s=5.0, backend=backend) + z.square().sum()).backward()
    want = expected(z, y)[1] + 2 * expected(z, y.roll(1), s=5.0)[1] + 2 * z.detach()
    torch.testing.assert_close(z.grad.double(), want, rtol=2e-5, atol=1e-6)


def test_gradient_flows_into_a_model_and_accumulates(backend):
    layer = torch.nn.Linear(6, 5, dtype=torch.float64)
    x, y = torch.randn(10, 6, dtype=torch.float64), torch.randint(0, 5, (10,))
    for _ in range(2):
        lmf_loss(layer(x), y, backend=backend).backward()
    want = 2 * expected(layer(x), y)[1].t() @ x
    torch.testing.assert_close(layer.weight.grad, want)


def test_loss_is_right_when_no_gradient_is_asked_for(backend):
    z, y = torch.randn(8, 5), torch.randint(0, 5, (8,))
    want, _ = expected(z, y)
    for loss in (
        lmf_loss(z, y, backend=backend),
        torch.no_grad()(lmf_loss)(z.clone().requires_grad_(), y, backend=backend),
        torch.inference_mode()(lmf_loss)(z.clone().requires_grad_(), y, backend=backend),
    ):
        assert not loss.requires_grad
        assert_exact(loss, want)


def loss_and_gradient(z, y, **options):
    z = z.detach().requires_grad_()
    loss = lmf_loss(z, y, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@REDUCTIONS
def test_bitwise_the_same_from_run_to_run(reduction, backend):
    rows = 100 if backend == "triton" else 20_000
    z, y = torch.randn(rows, 9), torch.randint(0, 9, (rows,))
    runs = [loss_and_gradient(z, y, reduction=reduction, backend=backend) for _ in range(3)]
    for loss, grad in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and torch.equal(grad, runs[0][1])


@REDUCTIONS
def test_native_is_bitwise_the_same_for_any_number_of_threads(reduction):
    z, y = torch.randn(20_001, 9), torch.randint(0, 9, (20_001,))
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(loss_and_gradient(z, y, reduction=reduction, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and torch.equal(grad, runs[0][1])


def test_deterministic_algorithms_are_accepted(backend):
    torch.use_deterministic_algorithms(True)
    try:
        check(torch.randn(8, 5), torch.randint(0, 5, (8,)), backend)
    finally:
        torch.use_deterministic_algorithms(False)
