"""The main rows of docs/support.md on a CUDA or ROCm device, where there is one."""

from __future__ import annotations

import pytest
import torch
from checks import accumulated, assert_exact
from oracle import expected
from torch import nn
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from lmf_kernels import LMFLoss, _backends, global_normalizer, linear_lmf_loss, lmf_loss
from lmf_kernels._call import SUM, Options
from lmf_kernels.math.slices import slice_sums

CUDA = torch.device("cuda")  # which the stubs of tests/gpu_stubs.py replace
COUNTS = [500, 80, 9, 40]

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA or ROCm device", allow_module_level=True)

pytestmark = pytest.mark.parametrize("backend", [b for b in _backends.available_backends(CUDA) if b != "reference"])


def exact(z, y, criterion, **options):
    tables = {name: buffer.cpu() for name, buffer in criterion.named_buffers()}
    return expected(z.detach().cpu(), y.cpu(), s=criterion.s, **tables, **options)


def problem(backend, dtype=torch.float32, shape=(33, 4), **options):
    criterion = LMFLoss(COUNTS, weight=torch.rand(4) + 0.2, s=5.0, backend=backend, **options).to(CUDA)
    z = torch.randn(shape, device=CUDA).to(dtype).requires_grad_()
    y = torch.randint(0, 4, (shape[0], *shape[2:]), device=CUDA)
    y.view(-1)[0] = -100
    return criterion, z, y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(33, 4), (3, 4, 9, 7)])
def test_loss_and_gradient(shape, dtype, backend):
    criterion, z, y = problem(backend, dtype, shape)
    loss = criterion(z, y)
    exact_loss, exact_grad = exact(z, y, criterion)
    assert loss.dtype == accumulated(dtype)
    assert_exact(loss.cpu(), exact_loss)
    assert_exact(torch.autograd.grad(loss, z)[0].cpu(), exact_grad)


def test_bad_labels_are_nan_and_raise_nothing(backend):
    _, z, y = problem(backend)
    y[3] = 99
    loss = lmf_loss(z, y, reduction="none", backend=backend)
    assert loss.isnan().nonzero().tolist() == [[3]]


def test_the_host_waits_for_nothing(backend):
    criterion, z, y = problem(backend)
    criterion(z, y, global_normalizer(y, criterion)).backward()  # what is compiled at the first call may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(z, y, global_normalizer(y, criterion)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_without_recompilation(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    criterion, _, _ = problem(backend)
    step = torch.compile(criterion, fullgraph=True, dynamic=True)
    for size in (8, 33, 16):
        criterion.set_weight(torch.rand(4) + 0.2)
        _, z, y = problem(backend, shape=(size, 4))
        loss = step(z, y)
        exact_loss, exact_grad = exact(z, y, criterion)
        assert_exact(loss.cpu(), exact_loss)
        assert_exact(torch.autograd.grad(loss, z)[0].cpu(), exact_grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_cuda_graph_sees_new_weights(backend):
    criterion, z, y = problem(backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(criterion(z, y), z)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(z, y)
        (gradient,) = torch.autograd.grad(loss, z)
    for _ in range(2):
        criterion.set_weight(torch.rand(4) + 0.2)
        graph.replay()
        exact_loss, exact_grad = exact(z, y, criterion)
        assert_exact(loss.detach().cpu(), exact_loss)
        assert_exact(gradient.cpu(), exact_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_grad_scaler(dtype, backend):
    criterion, _, y = problem(backend)
    layer, x = nn.Linear(6, 4).to(CUDA), torch.randn(33, 6, device=CUDA)
    scaler = torch.amp.GradScaler(CUDA.type, init_scale=1024.0)
    with torch.autocast(CUDA.type, dtype):
        logits = layer(x)
        logits.retain_grad()
        loss = criterion(logits, y)
    scaler.scale(loss).backward()
    exact_loss, exact_grad = exact(logits, y, criterion, grad_output=torch.tensor(1024.0))
    assert (logits.dtype, loss.dtype, logits.grad.dtype) == (dtype, torch.float32, dtype)
    assert_exact(loss.detach().cpu(), exact_loss)
    assert_exact(logits.grad.cpu(), exact_grad)


def test_functional_transforms(backend):
    criterion, z, y = problem(backend, reduction="none")
    z = z.detach()
    exact_grad = exact(z, y, criterion, reduction="none")[1]
    jacobian = jacrev(lambda z: criterion(z, y))(z)
    assert_exact(jacobian.cpu(), torch.diag_embed(exact_grad.t()).permute(1, 2, 0))
    assert_exact(vmap(grad(criterion))(z, y).cpu(), exact_grad)


def test_checkpointing_and_double_backward(backend):
    criterion, z, y = problem(backend, torch.float64, (5, 4))
    loss = checkpoint(criterion, z, y, use_reentrant=False)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    assert_exact(gradient.detach().cpu(), exact(z, y, criterion)[1])
    assert torch.autograd.gradgradcheck(lambda z: criterion(z, y), z)


@pytest.mark.parametrize("shape", [(70, 8), (70, 301), (3, 20000), (2, 8, 33, 31)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_slices_of_the_classes(shape, dtype, backend):
    """Statistics of a slice, and the gradient written over its logits alone."""
    kernels = _backends.TABLE[backend].kernels
    whole = torch.randn(shape, device=CUDA).to(dtype)
    z = whole[:, 3:]
    y = torch.randint(0, shape[1] + 9, (shape[0], *shape[2:]), device=CUDA)
    options = Options(1.0, 1.0, 1.5, 5.0, 5, SUM)
    got = kernels.sums(z, y, 3, options)
    assert_exact(got.cpu(), slice_sums(z.cpu().double(), y.cpu(), 3, options))
    saved = torch.rand(5, y.numel(), device=CUDA, dtype=got.dtype)
    none, outer = saved.new_empty(0), saved.new_tensor(0.5)
    before = whole.clone()
    beside = kernels.backward(outer, z, y - 3, saved, none, options)
    kernels.backward_(outer, z, y - 3, saved, none, options)
    assert torch.equal(z, beside) and torch.equal(whole[:, :3], before[:, :3])


def test_linear_classifier(backend):
    """By chunks of the classes of some rows."""
    inputs = [torch.randn(n, 9, device=CUDA, dtype=torch.float64, requires_grad=True) for n in (70, 301)]
    y = torch.randint(0, 301, (70,), device=CUDA)
    loss = linear_lmf_loss(*inputs, y, s=4.0, memory_budget=8 * 3000, backend=backend)
    features, weight = (t.detach().cpu() for t in inputs)
    exact_loss, exact_grad = expected(features @ weight.t(), y.cpu(), s=4.0)
    torch.testing.assert_close(loss.detach().cpu(), exact_loss)
    grads = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(grads[0].cpu(), exact_grad @ weight)
    torch.testing.assert_close(grads[1].cpu(), exact_grad.t() @ features)
