"""linear_lmf_loss and LinearLMFLoss against the oracle on the logits of a float64 linear layer."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, INTERPRETED
from oracle import expected
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmf_kernels import LinearLMFLoss, LMFLoss, linear_lmf_loss, lmf_loss
from lmf_kernels._backends import TABLE
from lmf_kernels.linear import autograd, chunks

CPU_ONLY = pytest.mark.skipif(INTERPRETED, reason="the interpreter's process tests Triton alone")
ERROR = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the largest gradient element


def problem(rows: int, features: int, classes: int, dtype: torch.dtype, bias: bool = True):
    x, w = torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)
    b = torch.randn(classes).to(dtype) if bias else None
    y = torch.randint(0, classes, (rows,))
    if rows > 2:
        y[2] = -100
    tables = dict(margins=torch.rand(classes), ldam_weight=torch.rand(classes), focal_weight=torch.rand(classes))
    return x, w, b, y, tables


def check(x, w, b, y, backend, normalize=False, memory_budget=None, grad_output=None, **options) -> None:
    """Loss and gradients against the oracle, elements held against the largest one; twice through a retained graph."""
    given = [t for t in (x, w, b) if t is not None]
    exact_inputs = [t.detach().double().requires_grad_() for t in given]
    features, head, *rest = exact_inputs
    if normalize:
        features, head = F.normalize(features, dim=1), F.normalize(head, dim=1)
    z = F.linear(features, head, *rest)
    exact, exact_grad = expected(z.detach(), y, grad_output=grad_output, **options)
    exact_grads = torch.autograd.grad(z, exact_inputs, exact_grad)

    inputs = [t.detach().requires_grad_() for t in given]
    loss = linear_lmf_loss(
        inputs[0], inputs[1], y, linear_bias=inputs[2] if b is not None else None, normalize=normalize,
        memory_budget=memory_budget, backend=backend, **options,
    )  # fmt: skip
    assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.dtype in ERROR:
        close(loss, exact, x.dtype)
    else:
        assert (loss - exact).norm() <= 30 * torch.finfo(x.dtype).eps * exact.norm()  # the logits' rounding, s times
    unfused = inputs  # whose error is what half numbers may cost
    if x.dtype not in ERROR:
        head = (F.normalize(inputs[0], dim=1), F.normalize(inputs[1], dim=1)) if normalize else inputs[:2]
        unfused = torch.autograd.grad(
            lmf_loss(F.linear(*head, *inputs[2:]), y, backend=backend, **options), inputs, grad_output
        )
    for again in (True, False):
        grads = torch.autograd.grad(loss, inputs, grad_output, retain_graph=again)
        for got, want, given, pair in zip(grads, exact_grads, inputs, unfused, strict=True):
            assert got.dtype == given.dtype
            if x.dtype in ERROR:
                close(got, want, x.dtype)
            else:
                assert (got - want).norm() <= 1.3 * (pair - want).norm() + torch.finfo(x.dtype).eps * want.norm()


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = ERROR.get(dtype) or 2 * torch.finfo(dtype).eps
    largest = want.nan_to_num().abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=error, atol=error * largest, equal_nan=True)


# Whole rows in one chunk, several chunks of them, and chunks of a part of the classes of some rows.
BUDGETS = (None, 80 * 301 * 8, 3000)


@pytest.mark.parametrize("budget", BUDGETS, ids=["one chunk", "rows", "classes"])
@pytest.mark.parametrize("dtype", [*ERROR, torch.bfloat16, torch.float16])
def test_loss_and_gradients(dtype, budget, backend):
    classes = 40 if INTERPRETED else 301
    for case, reduction in enumerate(("none", "mean", "sum")):
        rows = 20 if INTERPRETED else 137 if budget else 37
        x, w, b, y, tables = problem(rows, 13, classes, dtype, bias=case != 1)
        outer = torch.rand(y.shape if reduction == "none" else ())
        for normalize in (False, True):
            check(x, w, b, y, backend, normalize, budget, outer, reduction=reduction, s=4.0, **tables)
        if INTERPRETED:
            break


def test_the_budgets_are_what_they_say():
    """The cases above take the ways they are named after."""
    plans = [chunks.plan_chunks(137, 301, torch.float64, TABLE["native"], budget or 0) for budget in BUDGETS]
    assert plans[0] == (137, 301)
    assert plans[1].classes == 301 and chunks.FEWEST_ROWS <= plans[1].rows < 137
    assert plans[2].classes < 301


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (2, 5, 1), (3, 1, 129), (65, 7, 17)])
def test_ragged_sizes(shape, backend):
    x, w, b, y, tables = problem(*shape, torch.float64)
    for budget in (None, 200):
        check(x, w, b, y, backend, False, budget, reduction="sum", s=2.0, **tables)


def test_options(backend):
    x, w, b, y, tables = problem(20, 6, 30, torch.float64)
    y[:5] = 7
    for budget in (500,) if INTERPRETED else (None, 500):
        for options in (
            dict(ignore_index=7), dict(alpha=0.0), dict(beta=0.0), dict(s=1.0, gamma=0.0), dict(normalizer=3.0),
            dict(normalizer=(torch.tensor(2.0), 5)), dict(alpha=0.0, beta=0.0, reduction="sum"),
            dict(weight=tables["margins"]), dict(y=torch.full((20,), -100)),
        ):  # fmt: skip
            labels = options.pop("y", y if "ignore_index" in options else y.clamp(min=0))
            check(x, w, b, labels, backend, False, budget, **options)


def test_one_sample_no_sample_and_layouts(backend):
    x, w, b, y, _ = problem(5, 6, 9, torch.float64)
    y = y.clamp(min=0)
    one = linear_lmf_loss(x[1], w, y[1], linear_bias=b, backend=backend)
    assert one.shape == ()
    close(one, expected(F.linear(x[1], w, b), y[1])[0], x.dtype)
    for reduction in ("none", "mean", "sum"):
        empty, head = x[:0].clone().requires_grad_(), w.clone().requires_grad_()
        loss = linear_lmf_loss(empty, head, y[:0], reduction=reduction, backend=backend)
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert loss.isnan().all() if reduction == "mean" else not loss.sum()
        assert [g.shape for g in torch.autograd.grad(loss.sum(), (empty, head))] == [x[:0].shape, w.shape]
    check(x.t().contiguous().t(), w.t().contiguous().t(), b, y, backend)
    strided = torch.stack((y, y + 1), 1)[:, 0]
    check(x, w, b, strided, backend, reduction="sum")


@CPU_ONLY
def test_bad_labels():
    x, w, _, y, _ = problem(5, 6, 9, torch.float32)
    y[1] = 9
    for backend in BACKENDS:
        for budget in (None, 100):
            with pytest.raises(IndexError, match=r"target 9 is out of bounds: labels must lie in \[0, 9\)"):
                linear_lmf_loss(x, w, y, backend=backend, memory_budget=budget)


@CPU_ONLY
def test_gradcheck(backend):
    for normalize in (False, True):
        for reduction in ("none", "mean"):
            x, w, b, y, tables = problem(5, 3, 7, torch.float64)
            inputs = [t.requires_grad_() for t in (x, w, b)]

            def loss(x, w, b, normalize=normalize, reduction=reduction, y=y, tables=tables):
                options = dict(normalize=normalize, reduction=reduction, memory_budget=150, backend=backend, s=3.0)
                return linear_lmf_loss(x, w, y, linear_bias=b, **options, **tables)

            torch.autograd.gradcheck(loss, inputs)


def test_zero_vectors_of_the_cosine_classifier(backend):
    """F.normalize divides by at least 1e-12; so do we, in both directions."""
    x, w, _, y, _ = problem(4, 3, 5, torch.float64)
    x[1], w[2] = 0, 0
    check(x, w, None, y, backend, normalize=True, reduction="sum", s=2.0)


@CPU_ONLY
def test_only_needed_gradients_are_computed():
    x, w, b, y, _ = problem(8, 6, 9, torch.float32)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function in (
                torch.ops.lmf_kernels.linear_forward.default,
                torch.ops.lmf_kernels.linear_backward.default,
            ):
                run = autograd.backward_op if "backward" in str(function) else autograd.forward_op
                with self:
                    return run(*arguments)
            self.count += "mm" in str(function)
            return function(*arguments, **(keywords or {}))

    def products(*required: Tensor, backward: bool = True) -> int:
        for tensor in (x, w, b):
            tensor.requires_grad_(any(tensor is t for t in required))
        with Products() as mode:
            mode.count = 0
            loss = linear_lmf_loss(x, w, y, linear_bias=b)
            forward = mode.count
            if backward and required:
                loss.backward()
            assert mode.count == forward, "backward only scales"
        return forward

    assert products() == 1
    assert products(b) == 1
    assert products(x) == products(w) == 2
    assert products(x, w, b) == 3
    with torch.no_grad():
        assert products(x, w, b, backward=False) == 1


@CPU_ONLY
def test_float16_gradients_survive_a_loss_scale():
    """Without an own scale, gradients of a mean over many rows would underflow before the loss's scale reaches them."""
    x, w, _, y, _ = problem(4096, 4, 6000, torch.float16, bias=False)
    y = y.clamp(min=0)
    inputs = [(t * 0.1).requires_grad_() for t in (x, w)]
    scale = 2.0**16
    loss = linear_lmf_loss(*inputs, y, s=1.0)
    grads = torch.autograd.grad(loss * scale, inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    z = F.linear(*exact)
    exact_grads = torch.autograd.grad(z, exact, expected(z.detach(), y, s=1.0)[1] * scale)
    for got, want in zip(grads, exact_grads, strict=True):
        close(got, want, torch.float16)


@CPU_ONLY
def test_autocast():
    x, w, b, y, _ = problem(20, 6, 30, torch.float32)
    inputs = [t.requires_grad_() for t in (x, w, b)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_lmf_loss(x, w, y, linear_bias=b, s=4.0)
        unfused = lmf_loss(F.linear(x, w, b), y, s=4.0)
    assert loss.dtype == torch.float32
    close(loss, unfused.detach().double(), torch.bfloat16)
    grads, unfused_grads = torch.autograd.grad(loss, inputs), torch.autograd.grad(unfused, inputs)
    for got, want in zip(grads, unfused_grads, strict=True):
        assert got.dtype == torch.float32
        close(got, want.double(), torch.bfloat16)


@CPU_ONLY
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    x, w, b, y, tables = problem(20, 6, 30, torch.float32)
    inputs = [t.requires_grad_() for t in (x, w, b)]

    def step(x, w, b):
        return linear_lmf_loss(2 * x, w, y, linear_bias=b, normalize=True, reduction=reduction, **tables).sum()

    loss, compiled = step(*inputs), torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(loss, compiled)
    for got, want in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(got, want)


@CPU_ONLY
def test_opcheck():
    x, w, b, y, tables = problem(6, 3, 9, torch.float32)
    options = (1.0, 1.0, 1.5, 4.0, -100, 1, True, "native", 400)
    arguments = (x, w, b, y, *tables.values(), None, None, *options, 1.0, [True, False, True])
    torch.library.opcheck(torch.ops.lmf_kernels.linear_forward.default, arguments)
    _, saved, denominators, *_ = torch.ops.lmf_kernels.linear_forward(*arguments)
    arguments = (torch.tensor(1.0), x, w, b, y, saved, denominators, *options, [True] * 3)
    torch.library.opcheck(torch.ops.lmf_kernels.linear_backward.default, arguments)


def test_second_derivative_is_refused(backend):
    x, w, _, y, _ = problem(4, 3, 5, torch.float64)
    loss = linear_lmf_loss(x.requires_grad_(), w, y, backend=backend)
    with pytest.raises(RuntimeError, match=r"linear_lmf_loss has no second derivative .*lmf_loss of whole logits has"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(input=torch.randn(2, 3, 4)), ValueError, r"input must have shape \(N, D\) or \(D,\), got \(2, 3, 4\)"),
        (dict(input=[1.0]), TypeError, "input must be a tensor, got list"),
        (dict(linear_weight=torch.randn(5, 3)), ValueError, r"linear_weight must have shape \(C, 4\).*got \(5, 3\)"),
        (dict(linear_weight=torch.randn(0, 4)), ValueError, "linear_weight must have at least one class"),
        (dict(linear_weight=torch.randn(5, 4).double()), TypeError, "must have one dtype, got torch.float32, torch.fl"),
        (dict(linear_weight=torch.ones(5, 4).long()), TypeError, "linear_weight must be float16, .*got torch.int64"),
        (dict(linear_bias=torch.randn(4)), ValueError, r"linear_bias must have shape \(5,\).*got \(4,\)"),
        (dict(target=torch.tensor([0, 1])), ValueError, r"target must have shape \(3,\).*got \(2,\)"),
        (dict(target=torch.rand(3)), TypeError, "class probabilities"),
        (dict(margins=torch.rand(4)), ValueError, r"margins must have shape \(5,\)"),
        (dict(memory_budget=0), ValueError, "memory_budget must be a positive number of bytes, got 0"),
        (dict(memory_budget=1.5), ValueError, "memory_budget must be a positive number of bytes, got 1.5"),
        (dict(reduction="sum", normalizer=2.0), ValueError, "normalizer replaces the denominators"),
        (dict(s=0.0), ValueError, "s must be finite and > 0"),
        (
            dict(target=torch.zeros(3, dtype=torch.int64, device="meta")),
            RuntimeError,
            "target must be on input's device",
        ),
    ],
)
@CPU_ONLY
def test_errors(change, error, message):
    arguments = dict(input=torch.randn(3, 4), linear_weight=torch.randn(5, 4), target=torch.tensor([0, 1, 2]))
    with pytest.raises(error, match=message):
        linear_lmf_loss(**{**arguments, **change})


@CPU_ONLY
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("backend", "device"), [("native", "cpu"), ("reference", "cpu"), ("triton", "cuda"), ("native", "cuda")]
)
@pytest.mark.slow
def test_peak_memory(backend, device, normalize):
    """Under 5% of the logits' memory beyond inputs, gradients and accumulator, from fake tensors."""
    from peak_memory import linear_step_extra

    shape, device = (8192, 1024, 131072), torch.device(device)
    extra = linear_step_extra(*shape, torch.bfloat16, backend, device, normalize, bias=True)
    assert 50e6 < extra < 0.05 * 2 * shape[0] * shape[2], f"{extra / 1e6:.1f} MB"


@CPU_ONLY
def test_peak_memory_of_a_real_step():
    """What the allocator hands out in forward and backward is what fake tensors say.

    Apart from the temporaries of matrix products, a property of the machine: those are no more than the same products
    of plain tensors need.
    """
    from peak_memory import allocated_peaks, linear_step_extra

    rows, features, classes, chunk_rows = 512, 64, 65536, 128
    x, w, _, y, _ = problem(rows, features, classes, torch.bfloat16, bias=False)
    inputs = [t.requires_grad_() for t in (x, w)]
    budget = chunk_rows * classes * 2

    def step() -> list[Tensor]:
        loss = linear_lmf_loss(*inputs, y, memory_budget=budget)
        return list(torch.autograd.grad(loss, inputs))

    step()
    accounted = 2 * x.numel() + 4 * w.numel()
    peak, outside = allocated_peaks(step)
    extra = outside - accounted
    said = linear_step_extra(rows, features, classes, torch.bfloat16, "native", x.device, memory_budget=budget)
    assert budget <= extra < 1.6 * budget and said == pytest.approx(extra, rel=0.3), (extra, said, budget)

    part, weight = x.detach()[:chunk_rows], w.detach()
    logits, gradient = torch.zeros(chunk_rows, classes, dtype=x.dtype), torch.empty_like(part)
    some = logits[:, : chunks.CPU_SLICE // (2 * features)]
    products = (
        lambda: torch.mm(part, weight.t(), out=logits),
        lambda: some.t() @ part,
        lambda: torch.mm(logits, weight, out=gradient),
    )
    within = [whole - kept for whole, kept in map(allocated_peaks, products)]
    assert peak <= outside + max(within), (peak, outside, within)


# ---- the module -----------------------------------------------------------------------------------------------------
@CPU_ONLY
def test_module_is_linear_and_loss():
    counts = torch.linspace(100, 1, 30).long()
    head = LinearLMFLoss(6, counts, s=4.0, max_m=0.4, weight=torch.rand(30) + 0.5)
    x, y = torch.randn(20, 6), torch.randint(0, 30, (20,))
    pair = nn.Sequential(nn.Linear(6, 30)), LMFLoss(counts, s=4.0, max_m=0.4, weight=head.ldam_weight)
    pair[0][0].load_state_dict({name[7:]: t for name, t in head.state_dict().items() if name.startswith("linear.")})
    z = pair[0](x)
    torch.testing.assert_close(head.logits(x), z)
    torch.testing.assert_close(head(x, y), pair[1](z, y))
    head(x, y).backward()
    pair[1](z, y).backward()
    torch.testing.assert_close(head.linear.weight.grad, pair[0][0].weight.grad)
    torch.testing.assert_close(head.linear.bias.grad, pair[0][0].bias.grad)
    head.set_weight(torch.ones(30))
    torch.testing.assert_close(head(x, y, normalizer=7.0), LMFLoss(counts, s=4.0, max_m=0.4)(z, y, normalizer=7.0))
    cosine = LinearLMFLoss(6, counts, bias=False, normalize=True, dtype=torch.float64)
    assert cosine.linear.bias is None and cosine.linear.weight.dtype == torch.float64
    x = x.double()
    assert cosine.logits(x).abs().max() <= 1
    torch.testing.assert_close(cosine(x, y), lmf_loss(cosine.logits(x), y, margins=cosine.margins))
    assert "normalize=True" in repr(cosine)


@CPU_ONLY
def test_signatures_follow_the_loss_s():
    options = inspect.signature(lmf_loss).parameters
    own = inspect.signature(linear_lmf_loss).parameters
    assert [name for name in own if name not in options] == [
        "linear_weight",
        "linear_bias",
        "normalize",
        "memory_budget",
    ]
    assert all(own[name].default == options[name].default for name in options)
    module, loss = inspect.signature(LinearLMFLoss).parameters, inspect.signature(LMFLoss).parameters
    extra = ["in_features", "bias", "normalize", "memory_budget", "device", "dtype"]
    assert [name for name in module if name not in loss] == extra
    assert all(module[name].default == loss[name].default for name in loss)


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
