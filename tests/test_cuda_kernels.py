"""The CUDA kernels without a GPU: the extension's launch code, and its PTX in the emulator, against the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import BAR, DTYPES, accumulated, check
from cuda_emulator import emulated_cuda, needs_cuda_build  # noqa: F401  (the fixture `cuda`)
from emulated_cases import CASES, layouts, misaligned
from emulated_cases import labels as labels_with_bad_ones
from pairwise import pairs

from lmf_kernels import _ops, lmf_loss

pytestmark = needs_cuda_build
ROOT = Path(__file__).parents[1]

# name -> shape, multiprocessors of the device, the kernels it takes: each regime, and its ragged ends
SHAPES = {
    "flat": ((300, 7), 132, "flat"),
    "flat, one block": ((130, 31), 1, "flat"),
    "flat, two classes": ((129, 2), 132, "flat"),
    "one row": ((1, 5), 132, "rows"),
    "rows, lanes": ((70, 150), 1, "rows"),
    "rows, a warp": ((9, 1001), 132, "rows"),
    "rows, several warps": ((3, 3001), 132, "rows"),
    "rows, walked": ((2, 9000), 7, "rows"),
    "rows, split": ((2, 20011), 132, "rows"),
    "rows, many split": ((20, 17011), 40, "rows"),
    "pixels": ((2, 5, 9, 11), 132, "pixels"),
    "pixels, wide": ((2, 10, 32, 40), 1, "pixels"),
    "planes": ((3, 11, 19, 31), 1, "planes"),
}
TERMS = ((1.0, 1.0, 30.0), (1.3, 0.0, 5.0), (0.0, 0.7, 1.0), (0.5, 2.0, 1.0))  # alpha, beta, s


def tables(kind, classes):
    if kind == "none":
        return {}
    margins, w_1, w_2 = torch.rand(3, classes) + 0.1
    if kind == "mixed":
        return dict(margins=margins.half(), ldam_weight=w_1.double(), focal_weight=w_2.bfloat16().repeat(2)[::2])
    w_1[0] = w_2[1] = 0
    return dict(margins=margins, ldam_weight=w_1, focal_weight=w_2)


def labels(shape, ignored=True):
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    if ignored and target.numel() > 1:
        target.view(-1)[::5] = -100
    return target


LAYOUTS = {
    "contiguous": lambda z: z,
    "misaligned": misaligned,
    "padded": lambda z: torch.nn.functional.pad(z, (0, 0) * (z.dim() - 2) + (1, 4))[:, 1:-4],
    "classes last": lambda z: z.movedim(1, -1).contiguous().movedim(-1, 1),
    "classes first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda z: z.repeat_interleave(2, 1)[:, ::2],
}


@pairs(
    shape=list(SHAPES), dtype=DTYPES, layout=list(LAYOUTS), reduction=("none", "mean", "sum"), terms=TERMS,
    kind=("none", "zeros", "mixed"),
)  # fmt: skip
def test_results(shape, dtype, layout, reduction, terms, kind, cuda):
    size, cuda.multiprocessors, kernel = SHAPES[shape]
    logits, target = LAYOUTS[layout]((torch.randn(size) * 3).to(dtype)), labels(size)
    alpha, beta, s = terms
    outer = torch.rand(target.shape if reduction == "none" else (), dtype=accumulated(dtype))
    options = dict(alpha=alpha, beta=beta, s=s, reduction=reduction, **tables(kind, size[1]))
    check(logits, target, "native", outer, **options)
    assert len(cuda.launches) == 2
    if layout in ("contiguous", "misaligned") and "wide" not in shape:  # which hangs on both
        assert [launch.kernel.split()[0] for launch in cuda.launches] == [f"forward_{kernel}", f"backward_{kernel}"]


@pytest.mark.parametrize("base", ["aligned", "misaligned"])
@pytest.mark.parametrize("how, shape, dtype, arch", CASES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("where", ["on sm_90", pytest.param("on all", marks=pytest.mark.slow)])
def test_cases_shared_with_triton(how, shape, dtype, arch, base, where, cuda):
    if where == "on all":
        cuda.arch = arch
    z = layouts(how, shape, dtype)
    if base == "misaligned":
        z = misaligned(z)
    y, table = labels_with_bad_ones(z), torch.rand(shape[1])
    table[0] = 0
    options = {"margins": table - 0.3, "ldam_weight": table, "focal_weight": 1 - table, "reduction": "none"}
    check(z, y, "native", torch.randn(y.shape), **options)
    assert len(cuda.launches) == 2


@pytest.mark.parametrize("shape", ["flat", "rows, lanes", "rows, split", "pixels"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_bad_labels_poison_their_rows(shape, reduction, cuda):
    size, cuda.multiprocessors, _ = SHAPES[shape]
    logits, target = torch.randn(size), labels(size)
    bad = torch.zeros(target.shape, dtype=torch.bool)
    for i, label in enumerate((size[1], 2**62)):
        target.view(-1)[-1 - i], bad.view(-1)[-1 - i] = label, True
    target.view(-1)[0], bad.view(-1)[0] = 0, False
    _, grad = check(logits, target, "native", reduction=reduction, weight=torch.rand(size[1]) + 0.1)
    grad = grad.movedim(1, -1)
    assert grad[bad].isnan().all() and (reduction == "mean" or grad[~bad].isfinite().all())


@pytest.mark.parametrize("shape", ["flat, one block", "rows, lanes", "rows, split", "pixels"])
def test_order_of_blocks_does_not_change_a_bit(shape, cuda):
    size, cuda.multiprocessors, _ = SHAPES[shape]
    cuda.multiprocessors = max(cuda.multiprocessors, 3)
    logits, target = torch.randn(size), labels(size)
    losses = set()
    for order in ("forward", "reverse", "random"):
        cuda.options = {"racecheck": True, "order": order}
        losses.add(lmf_loss(logits, target, backend="native").item())
    assert len(losses) == 1


@pytest.mark.parametrize("shape", list(SHAPES))
def test_special_values(shape, cuda):
    size, cuda.multiprocessors, _ = SHAPES[shape]
    logits, target = torch.randn(size), labels(size, ignored=False)
    flat = logits.view(-1)
    flat[torch.randint(0, flat.numel(), (6,))] = torch.tensor([torch.nan, torch.inf, -torch.inf] * 2)
    logits[0] = -torch.inf
    check(logits, target, "native", reduction="none")


@pytest.mark.parametrize("layout", ["expanded", "strided", "four levels"])
def test_layouts_of_grad_output_and_target(layout, cuda):
    z, y = torch.randn(4, 5, 3, 6), torch.randint(0, 5, (4, 3, 6))
    outer = torch.rand(4, 3, 6)
    if layout == "expanded":
        outer = torch.rand(4, 1, 1).expand(4, 3, 6)
    elif layout == "strided":
        y, outer = y.transpose(1, 2).contiguous().transpose(1, 2), torch.rand(6, 3, 8)[..., ::2].permute(2, 1, 0)
    else:  # nothing collapses: the one layout that is copied
        z = torch.randn(3, 5, 2, 4, 2, 3).permute(5, 1, 4, 3, 2, 0)
        y, outer = torch.randint(0, 5, (3, 2, 4, 2, 3)), torch.rand(3, 2, 4, 2, 3)
    check(z, y, "native", outer, reduction="none")
    assert len(cuda.launches) == 2


@pytest.mark.parametrize("shape", [(0, 5), (3, 5, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_to_do(shape, reduction, cuda):
    check(torch.randn(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.long), "native", reduction=reduction)
    assert len(cuda.launches) == (0 if reduction == "none" else 1)


@pytest.mark.parametrize("rows", [1, 5, 33, 64, 100, 128, 140, 5000])
def test_few_long_rows_keep_the_device_busy(rows):
    """Two blocks a multiprocessor are there at once: no more, and not much less where rows can be shared."""
    grids = []
    z, y = torch.empty(rows, 128256, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.long)
    options = (1.0, 1.0, 1.5, 30.0, -100, 1)
    _ops._C.trace_cuda_forward(lambda _, grid, *__: grids.append(grid[0]), 132, z, y, *[None] * 5, *options)
    assert grids[0] <= 2 * 132
    assert grids[0] >= min(132, 16 * rows), "16: steps of 8192 classes"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_architectures(arch, shape, dtype, cuda):
    size, cuda.multiprocessors, _ = SHAPES[shape]
    cuda.arch = arch
    check((torch.randn(size) * 3).to(dtype), labels(size), "native")


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.0, 12.0, 25.0])
@pytest.mark.parametrize("shape", ["flat", "rows, lanes", "rows, walked", "rows, split", "pixels"])
@pytest.mark.parametrize("s", [1.0, 5.0])
def test_results_do_not_hang_on_the_last_bits_of_approximate_instructions(gap, shape, s, cuda, monkeypatch):
    """Approximate instructions perturbed by up to 2 ulp: twice the precision bar."""
    monkeypatch.setitem(BAR, torch.float32, (4e-5, 1e-30))
    size, cuda.multiprocessors, _ = SHAPES[shape]
    cuda.options = {"approx_noise": True}
    logits, target = torch.randn(size), labels(size, ignored=False)
    logits.scatter_add_(1, target.unsqueeze(1), torch.full_like(logits, gap))
    check(logits, target, "native", gamma=0.5, s=s, margins=torch.rand(size[1]), reduction="none")


FILES = ("test_edges", "test_layouts", "test_precision", "test_reductions", "test_ops")
# Labels that raise on CPU and poison on GPU.
EXCEPT = "not bad_label and not default_ignore_index and not goes_on"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_the_tests_of_all_backends(file):
    """What holds the CPU and Triton kernels holds these."""
    environment = {**os.environ, "LMF_TEST_BACKENDS": "native", "PYTHONPATH": str(ROOT / "tests")}
    options = ["-q", "-p", "cuda_emulator", "-p", "no:cacheprovider", "-m", "not slow", "-k", EXCEPT]
    command = [sys.executable, "-m", "pytest", *options, f"tests/{file}.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
