"""What the CUDA kernels move: bytes, sectors, widths and exponentials, counted by the emulator."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import emulated_cuda, needs_cuda_build  # noqa: F401  (the fixture `cuda`)

from lmf_kernels import lmf_loss

pytestmark = needs_cuda_build

# shape and multiprocessors: each regime, with rows that are multiples of 16 bytes
ALIGNED = [
    ((512, 8), 132), ((256, 16), 132), ((128, 64), 132), ((96, 256), 1), ((48, 1024), 132), ((4, 8192), 8),
    ((3, 16384), 8), ((2, 8, 64, 64), 1),
]  # fmt: skip
RAGGED = [((512, 7), 132), ((48, 1001), 132), ((2, 5, 33, 31), 132)]


def launch(cuda, shape, dtype, **options):
    size, cuda.multiprocessors = shape
    cuda.options = {}
    logits = torch.randn(size).to(dtype).requires_grad_()
    target = torch.randint(0, size[1], (size[0], *size[2:]))
    loss = lmf_loss(logits, target, backend="native", **options)
    loss.backward(torch.ones_like(loss))
    assert len(cuda.launches) == 2, "one launch each way"
    return cuda.launches, logits.numel() * logits.element_size(), target.numel()


def other_bytes(stats, rows):
    """Bytes a row beside the logits and the gradient."""
    names = ("target", "stats", "partials", "loss", "denominators", "grad_output")
    moved = [stats.memory[name][kind] for name in names if name in stats.memory for kind in ("ld_useful", "st_useful")]
    return sum(moved) / rows


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


@pytest.mark.parametrize("shape", [shape for shape in ALIGNED + RAGGED if shape[0][0] * shape[1] >= 96])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_bytes_beside_the_logits(shape, reduction, cuda):
    """Target 8 and statistics 20 a row, loss or grad_output 4; the sums of a block are next to nothing."""
    (forward, backward), _, rows = launch(cuda, shape, torch.float32, reduction=reduction)
    assert other_bytes(forward.stats, rows) <= 32 + 40 * forward.blocks / rows
    assert other_bytes(backward.stats, rows) <= 32 + 40 * backward.blocks / rows


@pytest.mark.parametrize("options, count", [({}, 2), ({"s": 1.0}, 1), ({"alpha": 0.0}, 1), ({"beta": 0.0}, 1)])
@pytest.mark.parametrize("shape", [((1024, 64), 132), ((48, 1024), 132), ((64, 8192), 1)])
def test_exponentials_of_an_element(shape, options, count, cuda):
    (forward, backward), size, rows = launch(cuda, shape, torch.bfloat16, **options)
    elements = size // 2
    # 4 logarithms and exponentials a row to finish it, and each lane of a warp once more to combine
    assert forward.stats.instructions["ex2"] * 32 <= count * 1.15 * elements + 16 * rows
    assert backward.stats.instructions["ex2"] * 32 <= count * 1.05 * elements
