"""The compiled Triton kernels, launched by the package's own code, in the PTX emulator on CPU tensors.

The emulator refuses accesses out of bounds, misaligned or uninitialised, and races. Approximate instructions are
perturbed by up to 2 ulp, on top of which DESIGN's precision bar is doubled.
"""

from __future__ import annotations

import checks
import pytest
import torch
from checks import INTERPRETED, check
from emulated_cases import BF16, CASES, F32, F64, labels, layouts
from ptxsim.emulate import emulate

from lmf_kernels import _ops, lmf_loss

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler, which the interpreter replaces")
triton_launch = pytest.importorskip("lmf_kernels.triton.launch")
STRICT = dict(racecheck=True, allow_post_atomic=True, approx_noise=True)


@pytest.fixture(autouse=True)
def _bar(monkeypatch):
    monkeypatch.setitem(checks.BAR, F32, (4e-5, 1e-30))


@pytest.fixture
def small_device(monkeypatch):
    """A device with one multiprocessor, where few rows are many: programs work on several units, one after another."""
    device = triton_launch.Device(torch.device("cpu"))
    device.multiprocessors = 1
    monkeypatch.setattr(triton_launch, "device_of", lambda _: device)
    return device


@pytest.mark.parametrize("how, shape, dtype, target", CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_value_and_gradient(how, shape, dtype, target):
    z = layouts(how, shape, dtype)
    y = labels(z)
    table = torch.rand(shape[1])
    table[0] = 0
    options = {"margins": table - 0.3, "ldam_weight": table, "focal_weight": 1 - table, "reduction": "none"}
    outer = torch.randn(y.shape)
    with emulate(target=target, seed=shape[0], **STRICT) as launches:
        check(z, y, "triton", grad_output=outer, **options)
    assert [launch.name for launch in launches] == ["forward_kernel", "backward_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("C", range(2, 67))
def test_every_small_number_of_classes(C, dtype):
    """Flat tiles begin and end anywhere in a row; the last one is not full."""
    z = torch.randn(2048 // C + 5, C).to(dtype)
    with emulate(target=90, **STRICT):
        check(z, labels(z), "triton", margins=torch.rand(C), reduction="none", grad_output=torch.randn(len(z)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "shape", [(300, 7), (200, 8), (60, 100), (40, 1000), (20, 3000), (5, 17000), (2, 17000), (1, 21, 24, 64)]
)
def test_reductions_of_many_programs(reduction, shape, small_device):
    z = torch.randn(shape)
    y = labels(z, bad=False)
    weight = torch.rand(shape[1])
    with emulate(target=90, order="random", batch_threads=256, **STRICT) as launches:
        check(z, y, "triton", margins=weight, weight=weight, reduction=reduction, grad_output=torch.tensor(-2.5))
    assert [launch.name for launch in launches] == ["forward_kernel", "backward_kernel"]
    counters = [*small_device._of_stream.values(), *small_device._spare]
    assert all((counter == 0).all() for counter in counters), "a counter was not set back"


@pytest.mark.parametrize(
    "terms", [(1.3, 0.7, 30.0), (1.3, 0.7, 1.0), (1.3, 0.0, 8.0), (1.3, 0.0, 1.0), (0.0, 0.7, 30.0)]
)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_terms_and_precision(terms, gamma):
    """Gaps of up to 60 logits around a large offset; one exponential an element where one is enough."""
    alpha, beta, s = terms
    z = torch.randn(40, 6) + 300
    z[:, 0] += torch.linspace(-60, 60, 40)
    y = torch.randint(0, 6, (40,))
    y[::2] = 0
    with emulate(target=90, **STRICT) as launches:
        check(z, y, "triton", alpha=alpha, beta=beta, s=s, gamma=gamma, reduction="none", margins=torch.rand(6))
    both = alpha != 0 and beta != 0 and s != 1
    a_row = [launch.stats.instructions["ex2"] * 32 / (launch.grid[0] * 128) for launch in launches]
    assert a_row[1] == (16 if both else 8)  # six classes, padded to eight


def test_float64():
    for shape in ((40, 7), (3, 300), (2, 5, 3, 9)):
        z = 20 * torch.randn(shape, dtype=F64)
        with emulate(target=90, racecheck=True, allow_post_atomic=True):
            check(z, labels(z), "triton", margins=torch.rand(shape[1], dtype=F64), reduction="none", gamma=0.5)


@pytest.mark.parametrize("shape", [(600, 7), (40, 1000), (2, 17000)])
def test_deterministic_whatever_the_order_of_programs(shape, small_device):
    z = torch.randn(shape, requires_grad=True)
    y = labels(z, bad=False)
    results = []
    for order, batch_threads in (("forward", 128), ("reverse", 128), ("random", 256), ("forward", 16384)):
        with emulate(target=90, order=order, batch_threads=batch_threads):
            loss = lmf_loss(z, y, weight=torch.linspace(0.1, 1, shape[1]), backend="triton")
            results.append((loss.detach(), *torch.autograd.grad(loss, z)))
    assert all(
        torch.equal(first, other) for result in results[1:] for first, other in zip(results[0], result, strict=True)
    )


@pytest.mark.parametrize("z_layout", ["contiguous", "crop"])
def test_expanded_and_strided_grad_output(z_layout):
    z = layouts(z_layout, (2, 5, 6, 40), F32)
    y = labels(z)
    for outer in (
        torch.tensor(0.5).expand(y.shape),
        torch.randn(40, 6, 2).permute(2, 1, 0),
        torch.randn(2, 1, 40).expand(y.shape),
    ):
        with emulate(target=90, **STRICT):
            check(z, y, "triton", grad_output=outer, reduction="none")


@pytest.mark.parametrize("target_layout", ["column", "expanded", "permuted"])
def test_targets_of_any_strides(target_layout):
    z = torch.randn(6, 5, 4, 9)
    y = {
        "column": torch.randint(0, 5, (6, 4, 9, 3))[..., 1],
        "expanded": torch.randint(0, 5, (6, 1, 9)).expand(6, 4, 9),
        "permuted": torch.randint(0, 5, (9, 6, 4)).permute(1, 2, 0),
    }[target_layout]
    with emulate(target=90, **STRICT):
        check(z, y, "triton")


def test_normalizers_are_read_on_the_device():
    z = torch.randn(20, 9)
    y = labels(z, bad=False)
    with emulate(target=90, **STRICT):
        check(z, y, "triton", normalizer=(torch.tensor(3.0), torch.tensor(7.0, dtype=F64)))
        check(z, y, "triton", normalizer=torch.tensor(3.0, dtype=BF16), weight=torch.rand(9).half())


def test_rows_and_classes_that_are_not_there():
    with emulate(target=90, **STRICT) as launches:
        for shape in ((0, 7), (0, 1000), (2, 5, 0, 3)):
            for reduction in ("mean", "sum", "none"):
                z = torch.randn(shape)
                check(z, torch.zeros(shape[:1] + shape[2:], dtype=torch.long), "triton", reduction=reduction)
        ignored = torch.full((9,), -100)
        check(torch.full((9, 7), torch.nan), ignored, "triton")
        check(torch.randn(9, 7), ignored, "triton", alpha=0.0, beta=0.0, reduction="sum")
    assert all(launch.name == "forward_kernel" or launch.grid[0] for launch in launches)


def test_the_registered_op_is_the_same_code():
    z, y = torch.randn(5, 7), torch.tensor([0, 1, 2, 3, 6])
    forward, backward, *_ = _ops.OPS["triton"]
    with emulate(target=90):
        loss, saved, denominators = forward(z, y, None, None, None, None, None, 1.0, 1.0, 1.5, 30.0, -100, 1)
        grad = backward(torch.tensor(1.0), z, y, saved, denominators, 1.0, 1.0, 1.5, 30.0, -100, 1)
        leaf = z.requires_grad_()
        direct = lmf_loss(leaf, y, backend="triton")
        assert torch.equal(loss, direct) and torch.equal(grad, torch.autograd.grad(direct, leaf)[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_replicated_values_agree(seed):
    """Lanes that hold the same row compute the same bits: otherwise the emulator sees two warps disagree."""
    torch.manual_seed(seed)
    shape = [(3, 20000), (9, 1000), (300, 8), (2, 21, 16, 16)][seed % 4]
    z = torch.randn(shape)
    with emulate(target=90, racecheck=True, allow_post_atomic=True, order="random", seed=seed):
        check(z, labels(z, bad=False), "triton", margins=torch.rand(shape[1]), reduction=("mean", "none")[seed % 2])
