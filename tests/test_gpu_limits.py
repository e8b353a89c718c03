"""What the compiled Triton kernels may cost: the tables of docs/gpu.md, row by row, against their limits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checks import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler, which the interpreter replaces")
TRITON = tuple(map(int, pytest.importorskip("triton").__version__.split(".")[:2]))
MADE_WITH = (3, 8)  # the tables: registers are another matter with each version of Triton and of its ptxas

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gpu_offline import CASES, DTYPES, TARGETS, kernels, padded, resources, traffic  # noqa: E402
from gpu_tables import peers, resource_row, traffic_row  # noqa: E402

IN_MAKE_TEST = ("(N, 7)", "(N, 8)", "(N, 1000)", "(N, 32000)", "(N, 5, 512, 512)")  # the others are slow
EACH_CASE = [
    pytest.param(case, dtype, marks=() if str(case) in IN_MAKE_TEST and dtype != torch.float16 else pytest.mark.slow)
    for case in CASES
    for dtype in DTYPES
]


def row_bytes(case, dtype):
    """Bytes of the logits of one row that is contiguous in memory, 0 where the class axis is strided."""
    return 0 if len(case.full) > 2 and case.layout == "contiguous" else case.full[1] * dtype.itemsize


def rescaled(kernel):
    """How often sums of a row are brought to another maximum: in each step but a single one, and to combine lanes."""
    tile = kernel.plan.tile
    steps, parts = -(-tile.C // (tile.K * tile.LPR * tile.V)), -(-tile.C // tile.chunk)
    return tile.LPR * ((steps if steps > 1 else 0) + (parts if tile.LPR > 1 else 0))


@pytest.mark.skipif(TRITON != MADE_WITH, reason="needs Triton 3.8: the table of registers is of that version")
@pytest.mark.parametrize("case, dtype", EACH_CASE, ids=str)
def test_no_spills_and_no_local_memory(case, dtype, capsys):
    found = {
        (step, target): resources(kernel, target) for step, kernel in kernels(case, dtype).items() for target in TARGETS
    }
    with capsys.disabled():
        print("\n|", " | ".join(map(str, resource_row(case, dtype, found))), "|")
    assert all(one.spilled == one.local == 0 for one in found.values())


@pytest.mark.parametrize("case, dtype", [each for each in EACH_CASE if each.values[1] != torch.float16], ids=str)
def test_traffic(case, dtype, capsys):
    found = traffic(case, dtype)
    forward, backward = found["forward"], found["backward"]
    with capsys.disabled():
        print("\n|", " | ".join(map(str, traffic_row(case, dtype, found))), "|")
    rows, C = case.small[0], case.small[1]
    # Every logit once; where the row is not in registers at its end, z_y once more (by each lane that finishes it).
    lanes = forward.programs / rows if case.regime == "large, split rows" else 1
    assert 1 <= forward.read <= 1 + lanes / C and backward.read == backward.written == 1
    size = row_bytes(case, dtype)
    if size % 32 == 0 or C <= 64:
        assert max(forward.read_sectors, backward.read_sectors, backward.written_sectors) <= 1.05
    if size % 16 == 0 or 16 < size <= 64 * dtype.itemsize:
        assert forward.width == 16
    programs = forward.programs if case.regime == "large, split rows" else 0
    # A split row's programs leave and read three sums each; a launch has a loss, two denominators and a counter.
    assert forward.row_bytes <= max(32, 28 + 24 * programs / rows + 16 / rows)
    assert backward.row_bytes <= max(32, 28 + 12 / rows)  # a launch reads grad_output and two denominators
    ahead, back = kernels(case, dtype).values()
    assert backward.exponentials * C == pytest.approx(2 * padded(back))
    # Forward: two more for each time that a lane's maximum may grow or lanes are combined, and three to finish a row,
    # which the lanes of a row may do together.
    if TRITON >= MADE_WITH or ahead.plan.tile.LPR == 1:  # Triton 3.4 and 3.6 do a lane's share of that K times over
        assert forward.exponentials * C <= 2 * padded(ahead) + 2 * rescaled(ahead) + 3.1 * ahead.plan.tile.LPR


@pytest.mark.slow
def test_no_more_bytes_and_launches_than_a_plain_cross_entropy():
    """Liger's cross-entropy, which has neither margins nor a focal term, and which reads back sums of the mask."""
    pytest.importorskip("liger_kernel", reason="needs the package liger-kernel")
    ours, other = peers().values()
    assert ours.bytes <= other.bytes
    assert ours.launches + len(ours.operations) <= other.launches + len(other.operations)
