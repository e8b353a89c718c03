"""Modes of autograd that a training loop brings along: autocast, gradient scaling, checkpointing, torch.func, vmap."""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from checks import INTERPRETED, assert_exact
from oracle import expected
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils.checkpoint import checkpoint

from lmf_kernels import FocalLoss, LDAMLoss, LMFLoss, _backends, ldam_margins, lmf_loss

COUNTS = [500, 80, 9, 40]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
FUSED = pytest.mark.parametrize("fused", ["triton"] if INTERPRETED else ["native"])


def labelled(*shape, classes=4, dtype=torch.float64):
    """Logits (*shape, C) and labels (*shape), the first one ignored."""
    z, y = torch.randn(*shape, classes, dtype=dtype), torch.randint(0, classes, shape)
    y.view(-1)[0] = -100
    return z, y


def tables(dtype=torch.float64):
    return dict(
        margins=torch.rand(4, dtype=dtype),
        ldam_weight=torch.rand(4, dtype=dtype) + 0.1,
        focal_weight=torch.rand(4, dtype=dtype) + 0.1,
        s=3.0,
    )


@HALF
def test_autocast_on_the_cpu(dtype, backend):
    """Half logits are read as they are, the loss is float32, the gradient half, the model's float32."""
    layer, criterion = nn.Linear(6, 4), LMFLoss(COUNTS, weight=torch.rand(4) + 0.2, backend=backend)
    x, y = torch.randn(11, 6), torch.randint(0, 4, (11,))
    with torch.autocast("cpu", dtype):
        logits = layer(x)
        logits.retain_grad()
        loss = criterion(logits, y)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    loss.backward()
    exact_loss, exact_grad = expected(logits, y, margins=ldam_margins(COUNTS), weight=criterion.ldam_weight)
    assert_exact(loss, exact_loss)
    assert logits.grad.dtype == dtype
    assert_exact(logits.grad, exact_grad)
    assert layer.weight.grad.dtype == torch.float32


def test_autocast_leaves_float32_logits_alone(backend):
    z, y = labelled(9, dtype=torch.float32)
    z.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = lmf_loss(z, y, backend=backend)
    exact_loss, exact_grad = expected(z, y)
    assert_exact(loss, exact_loss)
    assert_exact(torch.autograd.grad(loss, z)[0], exact_grad)


@HALF
@pytest.mark.skipif(
    not torch.backends.cuda.is_built() or find_spec("triton") is None, reason="needs Triton and a CUDA build of torch"
)
def test_autocast_on_cuda_with_fake_tensors(dtype):
    """What needs no GPU: the ops, dtypes and devices that a step under CUDA autocast goes through."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with torch._subclasses.FakeTensorMode():
        with torch.device("cuda"):
            layer, y = nn.Linear(6, 4), torch.zeros(11, dtype=torch.long)
            x, saved = torch.randn(11, 6), torch.randn(5, 11)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            logits = layer(x)
            loss = lmf_loss(logits, y, reduction="sum", backend="triton")
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
        # Autograd's engine would ask for the device; this is the op that it would call.
        backward = torch.ops.lmf_kernels.triton_backward
        gradient = backward(torch.ones_like(loss), logits, y, saved, saved.new_empty(0), 1.0, 1.0, 1.5, 30.0, -100, 2)
    assert (logits.dtype, loss.dtype, gradient.dtype) == (dtype, torch.float32, dtype)
    assert {logits.device.type, loss.device.type, gradient.device.type} == {"cuda"}
    assert loss.requires_grad


def test_grad_scaler(backend):
    """65536 times the loss through half logits and back, as GradScaler starts out."""
    layer, criterion = nn.Linear(6, 4), LMFLoss(COUNTS, alpha=0.5, beta=0.5, s=1.0, backend=backend)
    x, y = torch.randn(64, 6), torch.arange(64) % 4
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    before = layer.bias.detach().clone()
    with torch.autocast("cpu", torch.float16):
        logits = layer(x)
        loss = criterion(logits, y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    _, exact_grad = expected(logits, y, margins=ldam_margins(COUNTS), alpha=0.5, beta=0.5, s=1.0)
    torch.testing.assert_close((before - layer.bias).double(), exact_grad.sum(0), rtol=2e-3, atol=1e-4)
    assert scaler.get_scale() == 65536.0  # nothing overflowed


def test_backward_twice_adds_up(backend):
    z, y = labelled(9)
    z.requires_grad_()
    loss = lmf_loss(z, y, backend=backend)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_exact(z.grad, 2 * expected(z, y)[1])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, backend):
    """Of a head with its loss: forward runs again in backward."""
    layer, y = nn.Linear(6, 4, dtype=torch.float64), torch.randint(0, 4, (9,))
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    calls = []

    def head(x):
        calls.append(1)
        return lmf_loss(layer(x), y, backend=backend)

    loss = checkpoint(head, x, use_reentrant=reentrant)
    loss.backward()
    exact_loss, exact_grad = expected(layer(x), y)
    assert len(calls) == 2
    assert_exact(loss, exact_loss)
    torch.testing.assert_close(x.grad, exact_grad @ layer.weight)
    torch.testing.assert_close(layer.weight.grad, exact_grad.t() @ x)


def test_saved_tensor_hooks(backend):
    z, y = labelled(9)
    z.requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        loss = lmf_loss(z, y, backend=backend)
    assert_exact(torch.autograd.grad(loss, z)[0], expected(z, y)[1])


@REDUCTIONS
def test_grad_and_vjp_of_torch_func(reduction, backend):
    z, y = labelled(5)
    options = dict(reduction=reduction, **tables())
    outer = torch.rand(5 if reduction == "none" else (), dtype=z.dtype)
    exact_loss, exact_grad = expected(z, y, grad_output=outer, **options)
    loss, pull_back = vjp(lambda z: lmf_loss(z, y, backend=backend, **options), z)
    assert_exact(loss, exact_loss)
    assert_exact(pull_back(outer)[0], exact_grad)
    got = grad(lambda z: (outer * lmf_loss(z, y, backend=backend, **options)).sum())(z)
    assert_exact(got, exact_grad)


def test_jacrev_of_none(backend):
    """Row i of the Jacobian is the gradient of sample i, and nothing else moves."""
    z, y = labelled(5)
    options = tables()
    jacobian = jacrev(lambda z: lmf_loss(z, y, reduction="none", backend=backend, **options))(z)
    assert_exact(jacobian, torch.diag_embed(expected(z, y, reduction="none", **options)[1].t()).permute(1, 2, 0))


def test_gradients_of_a_batch_of_upstream_gradients(backend):
    z, y = labelled(5)
    z.requires_grad_()
    loss = lmf_loss(z, y, reduction="none", s=3.0, backend=backend)
    (rows,) = torch.autograd.grad(loss, z, torch.eye(5, dtype=z.dtype), is_grads_batched=True)
    exact_grad = expected(z, y, reduction="none", s=3.0)[1]
    assert_exact(rows, torch.diag_embed(exact_grad.t()).permute(1, 2, 0))


LAYOUTS = {  # shape of a mapped batch of logits, in_dims
    "models": ((3, 5, 4), 0),
    "shared labels": ((3, 5, 4), (0, None)),
    "shared logits": ((5, 4), (None, 0)),
    "samples": ((5, 4), 0),
    "last": ((5, 4, 3), (2, 1)),
    "images": ((3, 2, 4, 5, 6), 0),
    "no rows": ((3, 0, 4), 0),
}


def mapped(name):
    """Logits, labels and in_dims, and for each entry its own logits and labels."""
    shape, in_dims = LAYOUTS[name]
    z = torch.randn(shape, dtype=torch.float64)
    z_dim, y_dim = in_dims if isinstance(in_dims, tuple) else (in_dims, in_dims)
    one = z if z_dim is None else z.select(z_dim, 0)
    label_shape = one.shape[:1] + one.shape[2:] if one.dim() > 1 else ()
    size = 3 if z_dim is None else z.shape[z_dim]
    y = torch.randint(0, 4, (size, *label_shape))
    entries = [z if z_dim is None else z.select(z_dim, i) for i in range(size)]
    if y_dim is None:
        y = y[0]
        return z, y, in_dims, entries, [y] * size
    return z, y.movedim(0, y_dim), in_dims, entries, list(y)


@pytest.mark.parametrize("name", list(LAYOUTS))
@REDUCTIONS
def test_vmap(reduction, name, backend):
    """Loss and gradient equal those of the entries one by one, with gradients taken inside and outside."""
    z, y, in_dims, entries, labels = mapped(name)
    options = dict(reduction=reduction, **tables())

    def loss_of(z, y):
        return lmf_loss(z, y, backend=backend, **options)

    pairs = [expected(entry, label, **options) for entry, label in zip(entries, labels, strict=True)]
    exact_loss, exact_grads = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    assert_exact(vmap(loss_of, in_dims)(z, y), exact_loss)
    inside = vmap(grad(lambda z, y: loss_of(z, y).sum()), in_dims)(z, y)
    assert_exact(inside, exact_grads)

    z.requires_grad_()
    (outside,) = torch.autograd.grad(vmap(loss_of, in_dims)(z, y).sum(), z)
    z_dim = in_dims[0] if isinstance(in_dims, tuple) else in_dims
    torch.testing.assert_close(outside, exact_grads.sum(0) if z_dim is None else exact_grads.movedim(0, z_dim))


@FUSED
@pytest.mark.parametrize("reduction, calls", [("none", 1), ("sum", 1), ("mean", 7)])
def test_vmap_is_one_kernel_call_each_way(reduction, calls, fused, monkeypatch):
    """The mapped dimension is folded into N; the two denominators of each entry's 'mean' need a call of their own."""
    counted = {"forward": 0, "backward": 0}
    row = _backends.TABLE[fused]

    def count(name, step):
        def call(*arguments):
            counted[name] += 1
            return step(*arguments)

        return call

    forward, backward = count("forward", row.kernels.forward), count("backward", row.kernels.backward)
    kernels = row.kernels._replace(forward=forward, backward=backward)
    monkeypatch.setitem(_backends.TABLE, fused, dataclasses.replace(row, kernels=kernels))
    z, y = labelled(7, 5)
    vmap(grad(lambda z, y: lmf_loss(z, y, reduction=reduction, backend=fused).sum()))(z, y)
    assert counted == {"forward": calls, "backward": calls}


def test_vmap_over_margins_and_weights(backend):
    z, y = labelled(5)
    margins, w = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64) + 0.1
    options = dict(s=3.0, reduction="sum")

    def loss_of(z, margins, w):
        return lmf_loss(z, y, margins=margins, weight=w, backend=backend, **options)

    pairs = [expected(z, y, margins=m, weight=v, **options) for m, v in zip(margins, w, strict=True)]
    exact_loss, exact_grads = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    assert_exact(vmap(loss_of, (None, 0, 0))(z, margins, w), exact_loss)
    assert_exact(vmap(grad(loss_of), (None, 0, 0))(z, margins, w), exact_grads)


def test_nested_vmap(backend):
    z, y = labelled(2, 3, 5)
    got = vmap(vmap(grad(lambda z, y: lmf_loss(z, y, reduction="sum", s=3.0, backend=backend))))(z, y)
    assert_exact(got, expected(z.flatten(0, 2), y.flatten(), reduction="sum", s=3.0)[1].reshape(z.shape))


@pytest.mark.parametrize("kind", [LMFLoss, LDAMLoss, FocalLoss])
def test_an_ensemble_trains_with_vmap(kind, backend):
    """torch.func's recipe: models stacked, gradients of each by vmap of grad, against one model after the other."""
    weight = torch.rand(4) + 0.2
    criterion = kind(**({} if kind is FocalLoss else dict(cls_num_list=COUNTS)), weight=weight, backend=backend)
    models = [nn.Linear(6, 4, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 4, (9,))

    def loss_of(parameters, buffers, x, y):
        return criterion(functional_call(models[0], (parameters, buffers), (x,)), y)

    got = vmap(grad(loss_of), (0, 0, None, None))(parameters, buffers, x, y)
    for i, model in enumerate(models):
        options = {LMFLoss: {}, LDAMLoss: dict(beta=0.0), FocalLoss: dict(alpha=0.0)}[kind]
        margins = None if kind is FocalLoss else criterion.margins
        _, exact_grad = expected(model(x), y, margins=margins, weight=weight, **options)
        torch.testing.assert_close(got["weight"][i], exact_grad.t() @ x)


def test_functional_call_replaces_the_buffers(backend):
    z, y = labelled(9)
    criterion = LMFLoss(COUNTS, backend=backend)
    w, margins = torch.rand(4, dtype=z.dtype) + 0.1, torch.rand(4, dtype=z.dtype)
    buffers = dict(ldam_weight=w, focal_weight=w.flip(0), margins=margins)
    assert_exact(
        functional_call(criterion, buffers, (z, y)),
        expected(z, y, margins=margins, ldam_weight=w, focal_weight=w.flip(0))[0],
    )
    assert torch.equal(criterion(z, y), LMFLoss(COUNTS, backend=backend)(z, y))


def textbook(z, y, margins, ldam_weight, focal_weight, s, gamma):
    """The composite as written in the papers, mean over LDAM weights and over rows."""
    shift = F.one_hot(y, z.shape[1]) * margins
    ldam = F.cross_entropy(s * (z - shift), y, weight=ldam_weight)
    log_p = z.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return ldam + (focal_weight[y] * (1 - log_p.exp()) ** gamma * -log_p).mean()


@pytest.mark.parametrize("gamma", [0.5, 1.5, 2.0])
def test_hessian_by_two_reverse_passes(gamma, backend):
    z, y = torch.randn(3, 4, dtype=torch.float64), torch.randint(0, 4, (3,))
    options = dict(gamma=gamma, **tables())
    got = jacrev(jacrev(lambda z: lmf_loss(z, y, backend=backend, **options)))(z)
    torch.testing.assert_close(got, hessian(lambda z: textbook(z, y, **options))(z))
    zs, ys = torch.randn(2, 3, 4, dtype=torch.float64), torch.randint(0, 4, (2, 3))
    got = vmap(jacrev(jacrev(lambda z, y: lmf_loss(z, y, backend=backend, **options))))(zs, ys)
    want = torch.stack([hessian(lambda z, y=y: textbook(z, y, **options))(z) for z, y in zip(zs, ys, strict=True)])
    torch.testing.assert_close(got, want)


def forward_mode():
    """name -> a forward-mode derivative of f at z in direction v."""

    def dual(f, z, v):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent

    return {
        "forward_ad": dual,
        "jvp": lambda f, z, v: jvp(f, (z,), (v,))[1],
        "jacfwd": lambda f, z, v: (jacfwd(f)(z) * v).sum(),
        "hessian": lambda f, z, v: (hessian(f)(z) * v).sum(),
    }


@FUSED
@pytest.mark.parametrize("how", list(forward_mode()))
def test_forward_mode_names_what_to_do(how, fused):
    z, y = labelled(5)
    derivative, v = forward_mode()[how], torch.randn_like(z)
    with pytest.raises(NotImplementedError, match=r'forward-mode.*lmf_kernels.*jacrev.*backend="reference"'):
        derivative(lambda z: lmf_loss(z, y, backend=fused), z, v)


@pytest.mark.parametrize("how", ["forward_ad", "jvp", "jacfwd"])
def test_forward_mode_of_the_reference(how):
    """What the error of the fused kernels advises."""
    z, y = labelled(5)
    v = torch.randn_like(z)
    got = forward_mode()[how](lambda z: lmf_loss(z, y, s=3.0, backend="reference"), z, v)
    torch.testing.assert_close(got, (expected(z, y, s=3.0)[1] * v).sum())


def test_bad_label_under_vmap(backend):
    """The native op sees the labels and raises; elsewhere the row is NaN, as on a GPU."""
    z, y = labelled(2, 3)
    y[1, 2] = 7
    loss_of = vmap(lambda z, y: lmf_loss(z, y, reduction="none", backend=backend))
    if backend == "native":
        with pytest.raises(IndexError, match="7"):
            loss_of(z, y)
    else:
        loss = loss_of(z, y)
        assert math.isnan(loss[1, 2]) and loss.isfinite().sum() == 5
