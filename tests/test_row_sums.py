"""Sums of rows over slices of their classes, and gradients written over slices of the logits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from checks import INTERPRETED, accumulated, assert_exact
from oracle import expected
from torch import Tensor

from lmf_kernels._backends import TABLE
from lmf_kernels._call import SUM, Options, Tables
from lmf_kernels.math.rows import RowTables, read_labels
from lmf_kernels.math.slices import combine, finish, no_sums, scales

SHAPES = [(7, 5), (9, 300), (3, 5, 4, 2), (2, 1000), (70, 8)]
OPTIONS = [
    Options(alpha, beta, gamma, s, -100, SUM)
    for alpha, beta, gamma, s in (
        (1.3, 0.7, 1.5, 5.0),
        (1.0, 0.0, 0.0, 5.0),
        (0.0, 1.0, 1.5, 5.0),
        (1.0, 1.0, 0.0, 1.0),
    )
]


def exact_sums(z: Tensor, y: Tensor, first: int, options: Options) -> Tensor:
    """m, t1, t2, z_y of eq. 1 in float64, the sums relative to the own maximum."""
    rows = z.double().movedim(1, -1).reshape(-1, z.shape[1])
    local = y.reshape(-1) - first
    mine = torch.arange(z.shape[1]) == local[:, None]
    others = rows.masked_fill(mine, -math.inf)
    m = others.amax(1)
    d = torch.where(mine, -math.inf, rows - m.clamp_min(-1e300)[:, None])
    t1 = (scales(options)[0] * d).exp().sum(1)
    t2 = (scales(options)[1] * d).exp().sum(1)
    return torch.stack((m, t1, t2, torch.where(mine, rows, 0.0).sum(1)))


def compare(
    shape: tuple[int, ...], dtype: torch.dtype, options: Options, backend: str, layout: str = "contiguous"
) -> None:
    kernels = TABLE[backend].kernels
    classes = shape[1]
    z = (2 * torch.randn(shape)).to(dtype)
    if layout == "padded":
        z = (2 * torch.randn(shape[0], classes + 3)).to(dtype)[:, :classes]
    y = torch.randint(0, classes, (shape[0], *shape[2:]))
    y.view(-1)[1] = -100
    kept = y.reshape(-1) != -100
    cuts = [0, classes // 3, classes // 3 + 1, classes]
    total = no_sums(y.numel(), z)
    slices = [(lo, hi) for lo, hi in itertools.pairwise(cuts) if hi > lo]
    for lo, hi in slices:
        part = kernels.sums(z[:, lo:hi], y, lo, options)
        exact = exact_sums(z[:, lo:hi], y, lo, options)
        assert_exact(part[:, kept], exact[:, kept], f"classes [{lo}, {hi})")
        total = combine(total, part, options)
    loss, saved, denominators = finish(
        total, read_labels(y, classes, -100), RowTables(None, None, None), Tables(), options
    )
    exact_loss, exact_grad = expected(z, y, **options._asdict() | {"reduction": "sum"})
    assert_exact(loss, exact_loss, "loss")
    outer = torch.ones((), dtype=accumulated(dtype))
    before, grad = z.clone(), z.clone()
    for lo, hi in slices:
        kernels.backward_(outer, grad[:, lo:hi], y - lo, saved, denominators, options)
        assert torch.equal(grad[:, hi:], before[:, hi:]), "only the slice is written"
    assert_exact(grad, exact_grad, "gradient")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slices_make_the_whole(shape, dtype, backend):
    for options in OPTIONS[: 1 if INTERPRETED else None]:
        compare(shape, dtype, options, backend)


def test_padded_rows(backend):
    compare((9, 300), torch.float32, OPTIONS[0], backend, "padded")


def test_special_values(backend):
    """NaN and +inf stay visible, -inf makes empty sums; a slice of its own class alone has no competitor."""
    inf, nan = math.inf, math.nan
    sums, options = TABLE[backend].kernels.sums, Options(1.0, 1.0, 1.5, 3.0, -100, SUM)
    z = torch.tensor([[0.0, nan, 1], [2, inf, 0], [-inf, -inf, -inf], [1, 2, 3]])
    m, t1, t2, z_y = sums(z, torch.tensor([0, 0, 5, 1]), 0, options)
    assert t1[:2].isnan().all() and t2[:2].isnan().all()
    assert m[2] == -inf and t1[2] == 0 and t2[2] == 0 and z_y.tolist() == [0, 2, 0, 2]
    alone = sums(z[3:, :1], torch.tensor([4]), 4, options)
    assert alone[:, 0].tolist() == [-inf, 0, 0, 1]


@pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler, which the interpreter replaces")
@pytest.mark.parametrize("shape", [(9, 300), (2, 1001), (3, 5, 4, 2), (70, 8)], ids=str)
def test_the_compiled_kernels_in_the_emulator(shape, monkeypatch):
    """With checks of races and bounds; the gradient written over the logits included."""
    pytest.importorskip("triton")
    import checks
    from ptxsim.emulate import emulate

    monkeypatch.setitem(checks.BAR, torch.float32, (4e-5, 1e-30))
    with emulate(target=90, racecheck=True, allow_post_atomic=True, approx_noise=True):
        for dtype in (torch.float32, torch.bfloat16):
            compare(shape, dtype, OPTIONS[0], "triton")
