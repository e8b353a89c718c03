"""The CUDA kernels for slices of the classes, in the emulator: statistics, and gradients written over the logits."""

from __future__ import annotations

import math

import pytest
import test_linear
import test_row_sums
import torch
from checks import DTYPES, accumulated, assert_exact
from cuda_emulator import emulated_cuda, needs_cuda_build  # noqa: F401  (the fixture `cuda`)
from emulated_cases import CASES, layouts, misaligned
from pairwise import pairs
from test_cuda_kernels import LAYOUTS, SHAPES, TERMS

from lmf_kernels._call import NONE, SUM, Options
from lmf_kernels.math.slices import slice_sums

pytestmark = needs_cuda_build
FIRST = {"whole row": 0, "first part": 0, "a middle part": 17, "target elsewhere": 10**9, "beyond 32 bits": 2**40}


def labels(shape, first):
    """Of all the classes there may be around a slice, those of the slice among them, -100 ignored."""
    rows = (shape[0], *shape[2:])
    target = torch.randint(max(0, first - shape[1] // 2), first + shape[1], rows)
    target.view(-1)[::5] = -100
    return target


def sums(cuda, z, y, first, alpha, beta, s, ignore_index=-100):
    got = cuda.sums(z, y, first, alpha, beta, 1.5, s, ignore_index, SUM)
    assert got.dtype == accumulated(z.dtype)
    assert_exact(
        got, slice_sums(z.double(), y, first, Options(alpha, beta, 1.5, s, ignore_index, SUM)), "m, t1, t2, z_y"
    )
    return got


@pairs(shape=list(SHAPES), dtype=DTYPES, layout=list(LAYOUTS), terms=TERMS, part=list(FIRST))
def test_values(shape, dtype, layout, terms, part, cuda):
    """Every row of every layout, whether its target is in the slice or not, and ignored ones."""
    size, cuda.multiprocessors, kernel = SHAPES[shape]
    z, y = LAYOUTS[layout]((torch.randn(size) * 3).to(dtype)), labels(size, FIRST[part])
    if part == "target elsewhere":
        y.clamp_max_(999)
    sums(cuda, z, y, FIRST[part], *terms)
    (launch,) = cuda.launches
    if layout in ("contiguous", "misaligned"):
        assert launch.kernel.split()[0] == f"sums_{'pixels' if kernel == 'planes' else kernel}"


@pytest.mark.parametrize("base", ["aligned", "misaligned"])
@pytest.mark.parametrize("how, shape, dtype, arch", CASES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("where", ["on sm_90", pytest.param("on all", marks=pytest.mark.slow)])
def test_cases_shared_with_forward(how, shape, dtype, arch, base, where, cuda):
    if where == "on all":
        cuda.arch = arch
    z = layouts(how, shape, dtype)
    sums(cuda, misaligned(z) if base == "misaligned" else z, labels(shape, 1), 1, 1.0, 1.0, 5.0)


@pytest.mark.parametrize("shape", ["flat, one block", "rows, lanes", "rows, split", "pixels"])
def test_ignore_index_is_a_label_of_the_whole(shape, cuda):
    """Not of the slice, and it wins over a class of that number."""
    size, cuda.multiprocessors, _ = SHAPES[shape]
    z, y = torch.randn(size), torch.full((size[0], *size[2:]), 103)
    y.view(-1)[0] = 3
    assert not sums(cuda, z, y, 100, 1.0, 1.0, 5.0, ignore_index=103)[3].any()
    z_y = sums(cuda, z, y, 100, 1.0, 1.0, 5.0, ignore_index=3)[3]
    assert z_y[0] == 0 and z_y[1:].all()


@pytest.mark.parametrize("shape", list(SHAPES))
def test_special_values(shape, cuda):
    """NaN and +inf stay visible in the sums, -inf makes empty ones."""
    size, cuda.multiprocessors, _ = SHAPES[shape]
    z, y = torch.randn(size), torch.full((size[0], *size[2:]), -1)
    z[0] = -math.inf
    if size[0] > 2:
        z[1, size[1] // 2], z[2, -1] = math.nan, math.inf
    got = cuda.sums(z, y, 0, 1.0, 1.0, 1.5, 3.0, -100, SUM)
    exact = slice_sums(z.double(), y, 0, Options(1.0, 1.0, 1.5, 3.0, -100, SUM))
    assert_exact(got[1:], exact[1:], "t1, t2, z_y")
    finite = exact[1].isfinite()
    assert_exact(got[0, finite], exact[0, finite], "m")
    assert got[:, 0].tolist() == [-math.inf, 0, 0, 0]


def test_special_values_as_the_other_backends(cuda):
    test_row_sums.test_special_values("native")


@pytest.mark.parametrize("shape", ["flat", "rows, lanes", "rows, several warps", "rows, many split", "pixels"])
def test_order_of_blocks_does_not_change_a_bit(shape, cuda):
    size, cuda.multiprocessors, _ = SHAPES[shape]
    cuda.multiprocessors = max(cuda.multiprocessors, 3)
    z, y = torch.randn(size), labels(size, 1)
    results = []
    for order in ("forward", "reverse", "random"):
        cuda.options = {"racecheck": True, "order": order}
        results.append(cuda.sums(z, y, 1, 1.0, 1.0, 1.5, 3.0, -100, SUM))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_nothing_to_do(cuda):
    for shape in ((0, 5), (3, 5, 0)):
        y = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
        assert cuda.sums(torch.randn(shape), y, 0, 1.0, 1.0, 1.5, 3.0, -100, SUM).shape == (4, 0)
        cuda.backward_(
            torch.ones(()), torch.randn(shape), y, torch.zeros(5, 0), torch.empty(0), 1.0, 1.0, 1.5, 3.0, -100, SUM
        )
    assert not cuda.launches


# shape, multiprocessors, blocks that share a row
TRAFFIC = [
    ((256, 16), 132, 1), ((48, 1000), 132, 1), ((48, 1024), 1, 1), ((4, 8192), 8, 1), ((2, 40000), 132, 5),
    ((2, 10, 32, 40), 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape, multiprocessors, share", TRAFFIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_read_once_in_16_bytes_a_thread(shape, multiprocessors, share, dtype, cuda):
    cuda.multiprocessors, cuda.options = multiprocessors, {}
    z, y = torch.randn(shape).to(dtype), torch.full((shape[0], *shape[2:]), -1)  # split rows gather z_y once more
    cuda.sums(z, y, 0, 1.0, 1.0, 1.5, 3.0, -100, SUM)
    ((launch,), size) = cuda.launches, z.numel() * z.element_size()
    memory = launch.stats.memory
    assert memory["logits"]["ld_useful"] == size and memory["logits"]["ld_sectors"] * 32 <= 1.05 * size
    assert memory["logits"]["ld_requests"] * 32 * 16 <= 1.1 * size
    rows = y.numel()
    assert memory["target"]["ld_unique"] == 8 * rows and memory["sums"]["st_useful"] == 4 * 4 * rows
    parts = 3 * 4 * launch.blocks if share > 1 else 0
    assert launch.blocks == share * rows or share == 1
    assert [memory.get("partials", {}).get(f"{kind}_useful", 0) for kind in ("st", "ld")] == [parts, parts]


@pytest.mark.parametrize("shape, multiprocessors", [((37, 1001), 132), ((24, 9001), 8)])
@pytest.mark.parametrize("place", [torch.clone, misaligned], ids=["aligned", "misaligned"])
def test_rows_of_any_alignment_are_read_in_16_bytes(shape, multiprocessors, place, cuda):
    cuda.multiprocessors, cuda.options = multiprocessors, {}
    z = place(torch.randn(shape).bfloat16())
    cuda.sums(z, torch.zeros(shape[0], dtype=torch.long), 0, 1.0, 1.0, 1.5, 3.0, -100, SUM)
    counts, size = cuda.launches[0].stats.memory["logits"], 2 * z.numel()
    assert counts["ld_useful"] == size and counts["ld_requests"] <= 0.5 * z.numel() / 32


# ---- the gradient over the logits ------------------------------------------------------------------------------------


@pairs(
    shape=list(SHAPES), dtype=DTYPES, layout=["contiguous", "misaligned", "padded", "classes last", "classes first"],
    reduction=("none", "mean", "sum"), terms=TERMS,
)  # fmt: skip
def test_gradient_over_the_logits(shape, dtype, layout, reduction, terms, cuda):
    """The same bits as beside them, nothing else written, no race with a neighbour, for labels in and out of range."""
    size, cuda.multiprocessors, kernel = SHAPES[shape]
    z, y = LAYOUTS[layout]((torch.randn(size) * 3).to(dtype)), labels(size, size[1] // 2)
    y.view(-1)[-1] = 2**40
    acc = accumulated(dtype)
    outer = torch.rand(y.shape if reduction == "none" else (), dtype=acc)
    denominators = torch.tensor([3.0, 5.0] if reduction == "mean" else [], dtype=acc)
    saved = torch.rand(5, y.numel(), dtype=acc)
    saved[1:, ::5] = 0  # as of ignored rows
    alpha, beta, s = terms
    for term, (c, g) in ((beta, (1, 3)), (alpha, (2, 4))):
        if term == 0:
            saved[c] = saved[g] = 0
    options = alpha, beta, 1.5, s, -100, ("none", "mean", "sum").index(reduction)
    beside = cuda.backward(outer, z, y, saved, denominators, *options)
    copy = torch.empty(0, dtype=dtype).set_(z.untyped_storage().clone(), z.storage_offset(), z.shape, z.stride())
    cuda.backward_(outer, copy, y, saved, denominators, *options)
    assert torch.equal(copy, beside)
    if layout in ("contiguous", "misaligned") and "wide" not in shape:
        assert [launch.kernel.split()[0] for launch in cuda.launches] == [f"backward_{kernel}"] * 2
    copy.copy_(z)
    memory, before = (torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in (copy, z))
    assert torch.equal(memory, before), "only the logits' own memory is written"


def test_a_layout_that_is_copied(cuda):
    z = torch.randn(3, 5, 2, 4, 2, 3).permute(5, 1, 4, 3, 2, 0)
    y = torch.randint(-3, 9, (3, 2, 4, 2, 3))
    saved, outer = torch.rand(5, y.numel()), torch.rand(y.shape)
    sums(cuda, z, y, 1, 1.0, 1.0, 5.0)
    beside = cuda.backward(outer, z, y, saved, torch.empty(0), 1.0, 1.0, 1.5, 5.0, -100, NONE)
    cuda.backward_(outer, z, y, saved, torch.empty(0), 1.0, 1.0, 1.5, 5.0, -100, NONE)
    assert torch.equal(z, beside)


@pytest.mark.parametrize("shape", [*test_row_sums.SHAPES, (2, 17011), (3, 5, 11, 23)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slices_make_the_whole(shape, dtype, cuda):
    """Statistics of slices joined, loss, and gradients over the slices, against the oracle."""
    for options in test_row_sums.OPTIONS:
        test_row_sums.compare(shape, dtype, options, "native")


@pytest.mark.parametrize("elements", [None, 66 * 65, 700], ids=["one chunk", "rows", "classes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_linear_classifier(elements, dtype, cuda):
    x, w, b, y, tables = test_linear.problem(70, 7, 65, dtype)
    budget = elements and elements * dtype.itemsize
    for reduction in ("none", "mean"):
        outer = torch.rand(y.shape if reduction == "none" else ())
        test_linear.check(x, w, b, y, "native", False, budget, outer, reduction=reduction, s=4.0, **tables)
    steps = {launch.kernel.split("_")[0] for launch in cuda.launches}
    assert steps >= {"sums" if elements == 700 else "forward", "backward"}
