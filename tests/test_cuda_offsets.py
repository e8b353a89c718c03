"""Tensors of more than 2^31 elements: the last block of each CUDA kernel, and rows that are far apart.

The memory that is not touched is never there: neither the operating system's nor the emulator's.
"""

from __future__ import annotations

import pytest
import torch
from checks import assert_exact, check
from cuda_emulator import emulated_cuda, needs_cuda_build  # noqa: F401  (the fixture `cuda`)
from oracle import expected

from lmf_kernels._call import NONE, Options
from lmf_kernels.math.slices import slice_sums

OPTIONS = Options(1.0, 1.0, 1.5, 5.0, -100, NONE)

pytestmark = needs_cuda_build

# kernel -> shape beyond 2^31 elements, rows of a full tile
LAST_BLOCK = {
    "flat": ((2**24 + 37, 128), 128),
    "rows": ((2**31 // 1001 + 70, 1001), 8),
    "pixels 1": ((1, 65, 2**25 + 38), 128),
    "pixels 8": ((1, 65, 2**25 + 24), 1024),
    "planes": ((1, 65, 2**25 + 37), 504),
    "images": ((2**31 // (21 * 1023) + 1, 21, 1023), 341),
}


def huge_batch(kernel, labels, cuda):
    """Logits and labels below `labels`, of which the last tiles alone hold values; where the last rows are; blocks."""
    shape, tile = LAST_BLOCK[kernel]
    rows = shape[0] * (shape[2] if len(shape) == 3 else 1)
    blocks = -(-rows // tile)
    # As many multiprocessors as let each block have one tile; "pixels 1" is for devices that have few rows for each.
    cuda.multiprocessors = blocks if kernel in ("rows", "pixels 1") else -(-blocks // 8)
    cuda.options, cuda.tail = {}, 20 + tile
    logits = torch.empty(shape, dtype=torch.bfloat16)
    target = torch.empty((shape[0], *shape[2:]), dtype=torch.int64)
    assert logits.numel() > 2**31

    last = (slice(-1, None), slice(None), slice(-cuda.tail, None)) if len(shape) == 3 else (slice(-cuda.tail, None),)
    logits[last] = torch.randn(logits[last].shape).bfloat16()
    target[last[::2]] = torch.randint(0, labels, target[last[::2]].shape)
    return logits, target, (*last[:-1], slice(-min(20, rows % tile or tile), None)), blocks


@pytest.mark.slow
@pytest.mark.parametrize("kernel", list(LAST_BLOCK))
def test_last_block_of_a_huge_launch(kernel, cuda):
    logits, target, last, blocks = huge_batch(kernel, LAST_BLOCK[kernel][0][1], cuda)
    outer = torch.tensor(0.5).expand(target.shape)
    loss, saved, denominators = cuda.forward(logits, target, *[None] * 5, 1.0, 1.0, 1.5, 30.0, -100, 0)
    grad = cuda.backward(outer, logits, target, saved, denominators, 1.0, 1.0, 1.5, 30.0, -100, NONE)
    for launch in cuda.launches:
        assert launch.kernel.split()[0].split("_")[1] == {"images": "planes"}.get(kernel, kernel.split()[0])
        assert launch.blocks == blocks

    small, labels = logits[last].clone(), target[last[::2]].clone()
    options = dict(reduction="none", grad_output=torch.full(labels.shape, 0.5))
    exact_loss, exact_grad = expected(small, labels, **options)
    assert_exact(loss[last[::2]], exact_loss, "loss")
    assert_exact(grad[last], exact_grad, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["flat", "rows", "pixels 1", "pixels 8"])
def test_last_block_of_huge_sums_and_of_a_gradient_over_the_logits(kernel, cuda):
    classes = LAST_BLOCK[kernel][0][1]
    logits, target, last, blocks = huge_batch(kernel, 2 * classes, cuda)
    sums = cuda.sums(logits, target, classes // 2, *OPTIONS)
    small, labels = logits[last].clone(), target[last[::2]].clone()
    exact = slice_sums(small.double(), labels, classes // 2, OPTIONS)
    assert_exact(sums[:, -exact.shape[1] :], exact, "m, t1, t2, z_y")

    saved, outer, none = torch.empty(5, target.numel()), torch.tensor(0.5).expand(target.shape), torch.empty(0)
    saved[:, -cuda.tail :] = torch.rand(5, cuda.tail)
    beside = cuda.backward(outer, logits, target, saved, none, *OPTIONS)
    cuda.backward_(outer, logits, target, saved, none, *OPTIONS)
    assert torch.equal(logits[last], beside[last]) and not torch.equal(logits[last], small)
    assert [launch.blocks for launch in cuda.launches] == [blocks] * 3


@pytest.mark.parametrize("classes, multiprocessors, chunks", [(9, 132, 1), (1001, 132, 1), (20011, 132, 3)])
def test_rows_that_are_far_apart(classes, multiprocessors, chunks, cuda):
    cuda.multiprocessors, stride = multiprocessors, 2**31 + 11
    logits = torch.empty(stride + classes, dtype=torch.bfloat16).as_strided((2, classes), (stride, 1))
    logits.copy_(torch.randn(2, classes))
    target = torch.tensor([classes - 1, 3])
    check(logits, target, "native", torch.rand(2), reduction="none")
    exact = slice_sums(logits.double(), target, 0, OPTIONS)
    assert_exact(cuda.sums(logits, target, 0, *OPTIONS), exact)
    assert [cuda.launches[i].blocks for i in (0, 2)] == [2 * chunks if chunks > 1 else 1] * 2
