"""torch.compile and torch.export: one graph, no recompilation, eager mode's numbers, errors that say what to do."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import BACKENDS, INTERPRETED, assert_exact
from oracle import expected
from torch import nn
from torch._dynamo.utils import counters

import lmf_kernels
from lmf_kernels import DeferredReweighting, FocalLoss, LDAMLoss, LMFLoss, ldam_margins
from lmf_kernels._versions import release

COUNTS = [500, 80, 9, 40]
TORCH = release(torch.__version__)
ROOT = Path(lmf_kernels.__file__).parents[1]


@pytest.fixture(params=[pytest.param(b, marks=pytest.mark.slow if b == "reference" else ()) for b in BACKENDS])
def backend(request):
    """The reference, which is ordinary eager code, takes the compiler longest."""
    return request.param


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_graphs():
    """How often Dynamo compiled: once for each recompilation and each part between graph breaks."""
    return counters["stats"]["unique_graphs"]


def losses(backend):
    w = torch.rand(4) + 0.2
    return {
        "lmf": LMFLoss(COUNTS, weight=w, backend=backend),
        "ldam": LDAMLoss(COUNTS, backend=backend),
        "focal": FocalLoss(weight=w, backend=backend),
        "none": LMFLoss(COUNTS, reduction="none", backend=backend),
    }


def batch(size, *inner):
    x, y = torch.randn(size, 6, *inner), torch.randint(0, 4, (size, *inner))
    y.view(-1)[0] = -100
    return x, y


def gradients(loss, model):
    model.zero_grad()
    loss.sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_as_eager(compiled, model, criterion, x, y):
    loss, want = compiled(x, y), criterion(model(x), y)
    torch.testing.assert_close(loss, want)
    for grad, want_grad in zip(gradients(loss, model), gradients(want, model), strict=True):
        torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("kind", ["lmf", "ldam", "focal", "none"])
def test_one_graph_for_every_batch_size(kind, backend):
    model, criterion = nn.Linear(6, 4), losses(backend)[kind]
    step = torch.compile(lambda x, y: criterion(model(x), y), fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (8, 5, 33, 16):
        assert_as_eager(step, model, criterion, *batch(size))
    assert compiled_graphs() == 1


def test_sizes_become_dynamic_after_one_recompilation(backend):
    """torch.compile's default: static at first, dynamic from the second size on."""
    model, criterion = nn.Conv2d(6, 4, 1), losses(backend)["lmf"]
    step = torch.compile(lambda x, y: criterion(model(x), y), fullgraph=True, backend="aot_eager")
    for shape in ((4, 5, 6), (3, 7, 8), (6, 9, 3), (5, 4, 11)):
        assert_as_eager(step, model, criterion, *batch(*shape))
    assert compiled_graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype, backend):
    """The default compiler, under autocast for bfloat16."""
    model, criterion = nn.Linear(6, 4), losses(backend)["lmf"]

    def loss_of(x, y):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return criterion(model(x), y)

    step = torch.compile(loss_of, fullgraph=True, dynamic=True)
    for size in (8, 33):
        x, y = batch(size)
        loss, want = step(x, y), loss_of(x, y)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, want)
        for grad, want_grad in zip(gradients(loss, model), gradients(want, model), strict=True):
            torch.testing.assert_close(grad, want_grad)


def test_layouts_and_a_normalizer_on_the_device(backend):
    criterion = losses(backend)["lmf"]
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend="aot_eager")
    y = torch.randint(0, 4, (3, 5, 6))
    z = torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    options = dict(margins=ldam_margins(COUNTS), weight=criterion.ldam_weight)
    for value in (7.0, 70.0):
        normalizer = torch.tensor(value), torch.tensor(2 * value)
        loss = compiled(z, y, normalizer)
        (grad,) = torch.autograd.grad(loss, z)
        exact_loss, exact_grad = expected(z, y, normalizer=normalizer, **options)
        assert_exact(loss, exact_loss)
        assert_exact(grad, exact_grad)
        assert backend == "reference" or grad.stride() == z.stride()
    assert compiled_graphs() == 1


def test_new_weights_do_not_recompile(backend):
    model, criterion = nn.Linear(6, 4), losses(backend)["ldam"]
    step = torch.compile(lambda x, y: criterion(model(x), y), fullgraph=True, backend="aot_eager")
    schedule = DeferredReweighting(criterion, COUNTS, epoch=2)
    x, y = batch(8)
    seen = []
    for epoch in range(4):
        schedule(epoch)
        assert_as_eager(step, model, criterion, x, y)
        seen.append(step(x, y).item())
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert compiled_graphs() == 1


def test_hyper_parameters_are_constants(backend):
    """Of the graph; another value is noticed and compiled anew."""
    criterion = losses(backend)["lmf"]
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    z, y = torch.randn(5, 4), torch.randint(0, 4, (5,))
    for i, gamma in enumerate((1.5, 2.0)):
        criterion.gamma = gamma
        options = dict(margins=criterion.margins, weight=criterion.ldam_weight, gamma=gamma)
        assert_exact(compiled(z, y), expected(z, y, **options)[0])
        assert compiled_graphs() == i + 1


@pytest.mark.skipif(INTERPRETED, reason="about the choice of a backend, which the interpreter's tests make themselves")
def test_first_call_of_a_process_may_be_compiled():
    """Nothing is left to look up at the first call that torch.compile could not trace."""
    code = """
import torch
from lmf_kernels import LMFLoss
criterion = LMFLoss([50, 9, 4])
z, y = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 2, 0])
loss = torch.compile(criterion, fullgraph=True, backend="aot_eager")(z, y)
assert loss == criterion(z, y) and loss.requires_grad
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("what", ["function", "module"])
def test_vmap_inside(what, backend):
    if what == "module" and TORCH < (2, 9):
        pytest.skip("needs torch 2.9: torch 2.8 cannot trace the name of a mapped module")
    criterion = losses(backend)["none"]
    z, y = torch.randn(3, 5, 4, requires_grad=True), torch.randint(0, 4, (3, 5))
    mapped = torch.vmap(criterion if what == "module" else lambda z, y: criterion(z, y))
    loss = torch.compile(mapped, fullgraph=True, backend="aot_eager")(z, y)
    torch.testing.assert_close(loss, mapped(z, y))
    (grad,), (want,) = (torch.autograd.grad(result.sum(), z) for result in (loss, mapped(z, y)))
    torch.testing.assert_close(grad, want)


def test_compiled_autograd(backend):
    """Backward compiled too: of a compiled step that calls it, and of an eager forward."""
    model, criterion = nn.Linear(6, 4), losses(backend)["lmf"]
    x, y = batch(8)
    want = gradients(criterion(model(x), y), model)

    def step(x, y):
        criterion(model(x), y).backward()

    model.zero_grad()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")(x, y)
    torch.testing.assert_close([p.grad for p in model.parameters()], want)

    loss = criterion(model(x), y)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        torch.testing.assert_close(gradients(loss, model), want)


class Trained(nn.Module):
    """A model together with its loss, which is what a training step exports."""

    def __init__(self, backend):
        super().__init__()
        self.model = nn.Linear(6, 4)
        self.criterion = losses(backend)["lmf"]

    def forward(self, x, y):
        return self.criterion(self.model(x), y)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_step_trains(strict, backend):
    step = Trained(backend)
    size = torch.export.Dim("size")
    exported = torch.export.export(step, batch(8), dynamic_shapes=({0: size}, {0: size}), strict=strict)
    saved = io.BytesIO()
    torch.export.save(exported, saved)
    for program in (exported, torch.export.load(saved)):
        loaded = program.module()
        for count in (8, 13):
            x, y = batch(count)
            loss, want = loaded(x, y), step(x, y)
            options = dict(margins=step.criterion.margins, weight=step.criterion.ldam_weight)
            assert_exact(loss, expected(step.model(x), y, **options)[0])
            for grad, want_grad in zip(gradients(loss, loaded), gradients(want, step), strict=True):
                torch.testing.assert_close(grad, want_grad)


def test_exported_step_lowers_to_one_joint_graph(backend):
    """Forward and backward of the step in one graph, each with its fused op."""
    from torch.export.experimental import _export_forward_backward

    joint = _export_forward_backward(torch.export.export(Trained(backend), batch(8)))
    targets = [node.target for node in joint.graph.nodes]
    ops = torch.ops.lmf_kernels
    for step in ("forward", "backward"):
        name = f"{backend}_{step}"
        assert backend == "reference" or targets.count(getattr(ops, name).default) == 1
    outputs = joint.graph_signature.output_specs
    assert [spec.kind.name for spec in outputs] == ["LOSS_OUTPUT", "GRADIENT_TO_PARAMETER", "GRADIENT_TO_PARAMETER"]


FUSED = pytest.mark.parametrize("fused", ["triton"] if INTERPRETED else ["native"])
NO_DOUBLE_BACKWARD = r'double backward .*lmf_kernels.*backend="reference"'


@FUSED
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning", r"ignore:\s*Previous calculation:UserWarning")
def test_double_backward_inside_names_what_to_do(fused):
    criterion = LMFLoss(COUNTS, backend=fused)

    def penalty(z, y):
        (grad,) = torch.autograd.grad(criterion(z, y), z, create_graph=True)
        return grad.square().sum()

    z, y = torch.randn(5, 4, requires_grad=True), torch.randint(0, 4, (5,))
    if TORCH < (2, 13):  # an error, too, but torch's own
        with pytest.raises(Exception):  # noqa: B017
            torch.compile(penalty, fullgraph=True, backend="aot_eager")(z, y)
        return
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        with pytest.raises(Exception, match=NO_DOUBLE_BACKWARD):
            torch.compile(penalty, fullgraph=True, backend="aot_eager")(z, y)
        criterion.backend = "reference"  # what the message advises
        compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")(z, y)
    torch.testing.assert_close(torch.autograd.grad(compiled, z), torch.autograd.grad(penalty(z, y), z))


@FUSED
def test_double_backward_through_a_compiled_loss_is_refused(fused):
    """By torch itself: whatever it compiles is differentiable once."""
    z, y = torch.randn(5, 4, requires_grad=True), torch.randint(0, 4, (5,))
    loss = torch.compile(LMFLoss(COUNTS, backend=fused), fullgraph=True, backend="aot_eager")(z, y)
    with pytest.raises(RuntimeError, match="double backward"):
        (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        torch.autograd.grad(grad.sum(), z)


@FUSED
def test_double_backward_through_an_exported_step_names_what_to_do(fused):
    exported = torch.export.export(Trained(fused), batch(8)).module()
    weight = next(exported.parameters())
    (grad,) = torch.autograd.grad(exported(*batch(8)), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match=NO_DOUBLE_BACKWARD):
        torch.autograd.grad(grad.sum(), weight)


@FUSED
def test_functional_transforms_inside_name_what_to_do(fused):
    criterion = LMFLoss(COUNTS, backend=fused)
    z, y = torch.randn(5, 4), torch.randint(0, 4, (5,))

    def gradient(z):
        return torch.func.grad(lambda z: criterion(z, y))(z)

    # Older compilers hide the text of an error behind their own.
    words = r'torch\.func\.grad.*lmf_kernels.*backend="reference"' if TORCH >= (2, 13) else None
    with pytest.raises(Exception, match=words):
        torch.compile(gradient, fullgraph=True, backend="aot_eager")(z)
    criterion.backend = "reference"
    torch.testing.assert_close(torch.compile(gradient, fullgraph=True, backend="aot_eager")(z), gradient(z))
