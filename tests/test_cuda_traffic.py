"""What the CUDA kernels move: bytes, sectors, widths and exponentials, counted by the emulator."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import emulated_cuda, needs_cuda_build  # noqa: F401  (the fixture `cuda`)
from emulated_cases import misaligned

from lmf_kernels import lmf_loss

pytestmark = needs_cuda_build

# shape and multiprocessors: each regime, with rows that are multiples of 16 bytes
ALIGNED = [
    ((512, 8), 132), ((256, 16), 132), ((128, 64), 132), ((96, 256), 1), ((48, 1024), 132), ((4, 8192), 8),
    ((3, 16384), 8), ((2, 8, 64, 64), 1),
]  # fmt: skip
# Rows, or planes of pixels, of which many begin anywhere in 16 bytes: shape, multiprocessors, kernel
ANYWHERE = [
    ((512, 7), 132, "flat"), ((128, 63), 132, "flat"), ((24, 1001), 132, "rows"), ((4, 9001), 8, "rows"),
    ((2, 5, 71, 71), 1, "planes"),
]  # fmt: skip
RAGGED = [((512, 7), 132), ((48, 1001), 132), ((2, 5, 33, 31), 132)]


def launch(cuda, shape, dtype, place=torch.clone, **options):
    size, cuda.multiprocessors = shape
    cuda.options = {}
    logits = place(torch.randn(size).to(dtype)).requires_grad_()
    target = torch.randint(0, size[1], (size[0], *size[2:]))
    loss = lmf_loss(logits, target, backend="native", **options)
    loss.backward(torch.ones_like(loss))
    assert len(cuda.launches) == 2, "one launch each way"
    return cuda.launches, logits.numel() * logits.element_size(), target.numel()


def other_bytes(launched):
    """Bytes beside the logits and the gradient: of different addresses, and of all accesses of a warp."""
    memory = [counts for name, counts in launched.stats.memory.items() if name not in ("logits", "grad_logits")]
    return [sum(counts[f"ld_{kind}"] + counts[f"st_{kind}"] for counts in memory) for kind in ("unique", "useful")]


@pytest.mark.parametrize("shape", ALIGNED + RAGGED, ids=lambda shape: "x".join(map(str, shape[0])))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_read_once_and_gradients_written_once(shape, dtype, cuda):
    (forward, backward), size, _ = launch(cuda, shape, dtype)
    moved = [forward.stats.memory["logits"], backward.stats.memory["logits"], backward.stats.memory["grad_logits"]]
    assert [moved[0]["ld_useful"], moved[1]["ld_useful"], moved[2]["st_useful"]] == [size] * 3
    if shape not in ALIGNED:
        return
    sectors = [moved[0]["ld_sectors"], moved[1]["ld_sectors"], moved[2]["st_sectors"]]
    assert max(sectors) * 32 <= 1.05 * size
    requests = [moved[0]["ld_requests"], moved[1]["ld_requests"], moved[2]["st_requests"]]
    assert max(requests) * 32 * 16 <= 1.05 * size, "16 bytes a thread"


@pytest.mark.parametrize("shape", ANYWHERE, ids=lambda shape: "x".join(map(str, shape[0])))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("place", [torch.clone, misaligned], ids=["aligned", "misaligned"])
def test_vectors_of_any_alignment(shape, dtype, place, cuda):
    """16 bytes a thread but for heads and tails, with far fewer requests than one element a thread takes.

    Vectors of logits that lie otherwise than those of the gradient are put together from two, the second of which the
    cache has; a tile's edge in a plane is read with its neighbours.
    """
    (forward, backward), size, _ = launch(cuda, shape[:2], dtype, place)
    assert [one.kernel.split()[0] for one in (forward, backward)] == [f"forward_{shape[2]}", f"backward_{shape[2]}"]
    moved = [forward.stats.memory["logits"], backward.stats.memory["logits"], backward.stats.memory["grad_logits"]]
    assert [moved[0]["ld_unique"], moved[1]["ld_unique"], moved[2]["st_unique"]] == [size] * 3
    twice = shape[2] == "rows" and place is misaligned
    for counts, kind, limit in zip(moved, ("ld", "ld", "st"), (1.03, 2 if twice else 1.03, 1), strict=True):
        assert counts[f"{kind}_useful"] <= limit * size
        assert counts[f"{kind}_sectors"] * 32 <= 1.3 * max(1, limit) * size
        one_element_a_thread = size / dtype.itemsize / 32
        edges = 0.75 if twice or kind == "st" else 0.5
        assert counts[f"{kind}_requests"] <= edges * one_element_a_thread


A_ROW = 8 + 5 * 4  # its target and its five statistics
A_LAUNCH = {"none": 0, "sum": 4, "mean": 4 + 2 * 4}  # the loss or grad_output, the denominators
# Written and read: m, t1, t2 of a part of a row; a block's sums: the loss, or two of them and a sum of weights (the
# number of kept rows is added up by the atomic that counts the blocks).
A_PART, A_BLOCK = 2 * 3 * 4, {"none": 0, "sum": 2 * 4, "mean": 2 * 3 * 4}
FEW_ROWS = [((1, 8), 132), ((4, 8), 132), ((2, 1000), 132), ((3, 4096), 132), ((4, 32768), 132), ((2, 40000), 132)]


@pytest.mark.parametrize("shape", ALIGNED + RAGGED + FEW_ROWS, ids=lambda shape: "x".join(map(str, shape[0])))
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_bytes_beside_the_logits(shape, reduction, cuda):
    """At most 32 a row, and what blocks tell each other: nothing is left that could be left out.

    Parts of a row and blocks that share its statistics read them again, from the cache.
    """
    (forward, backward), _, rows = launch(cuda, shape, torch.float32, reduction=reduction)
    a_row = A_ROW + (4 if reduction == "none" else 0)
    assert a_row <= 32
    split = shape in FEW_ROWS[-2:]
    a_block = A_PART if split else A_BLOCK[reduction] if forward.blocks > 1 else 0
    unique, accessed = other_bytes(forward)
    assert unique == a_row * rows + A_LAUNCH[reduction] + a_block * forward.blocks
    assert accessed == unique + (8 * forward.blocks if split else 0)
    unique, accessed = other_bytes(backward)
    assert unique == a_row * rows + A_LAUNCH[reduction]
    assert accessed <= unique + (
        40 * backward.blocks if split else A_LAUNCH[reduction] * (rows // 32 + 8 * backward.blocks)
    )


@pytest.mark.parametrize(
    "shape", [((4096, 2), 132), ((300, 7), 132), ((48, 1000), 132), ((24, 4096), 1), ((24, 9000), 1)]
)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_at_most_32_bytes_a_row(shape, reduction, cuda):
    """With all that blocks tell each other, where a block has at least eight rows."""
    (forward, backward), _, rows = launch(cuda, shape, torch.bfloat16, reduction=reduction)
    assert rows >= 8 * forward.blocks
    assert other_bytes(forward)[0] <= 32 * rows and other_bytes(backward)[0] <= 32 * rows


@pytest.mark.parametrize("options, count", [({}, 2), ({"s": 1.0}, 1), ({"alpha": 0.0}, 1), ({"beta": 0.0}, 1)])
@pytest.mark.parametrize("shape", [((1024, 64), 132), ((48, 1024), 132), ((64, 8192), 1)])
def test_exponentials_of_an_element(shape, options, count, cuda):
    (forward, backward), size, rows = launch(cuda, shape, torch.bfloat16, **options)
    elements = size // 2
    # 4 logarithms and exponentials a row to finish it, and each lane of a warp once more to combine
    assert forward.stats.instructions["ex2"] * 32 <= count * 1.15 * elements + 16 * rows
    assert backward.stats.instructions["ex2"] * 32 <= count * 1.05 * elements
