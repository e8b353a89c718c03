"""Shapes, strides, storage offsets, target dtypes: everything F.cross_entropy reads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
from checks import DTYPES, INTERPRETED, accumulated, assert_exact, check
from oracle import expected
from pairwise import pairs

from lmf_kernels import lmf_loss

CGROUP = Path("/sys/fs/cgroup")
SHAPES = [(6,), (1,), (5, 6), (1, 1), (5, 6, 3), (2, 6, 3, 4), (2, 6, 3, 2, 4), (2, 3, 2, 2, 2, 2), (4, 1, 3)]


def target_of(logits):
    if logits.dim() == 1:
        return torch.tensor(logits.shape[0] - 1)
    return torch.randint(0, logits.shape[1], (logits.shape[0], *logits.shape[2:]))


@pairs(shape=SHAPES, reduction=("none", "mean", "sum"), dtype=DTYPES)
def test_shapes(shape, reduction, dtype, backend):
    logits = torch.randn(shape).to(dtype)
    target = target_of(logits)
    classes = shape[0] if len(shape) == 1 else shape[1]
    outer = torch.rand(target.shape if reduction == "none" else (), dtype=accumulated(dtype))
    check(
        logits,
        target,
        backend,
        outer,
        margins=torch.rand(classes),
        weight=torch.rand(classes) + 0.1,
        reduction=reduction,
    )


def _layouts():
    """name -> logits that hold their elements in an unusual order."""
    base = torch.randn(4, 6, 5, 8)
    wide = torch.randn(3000)
    return {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 9).t(),
        "transposed_spatial": base.transpose(2, 3),
        "permuted": base.permute(3, 2, 1, 0),
        "class_last": torch.randn(4, 5, 6).movedim(-1, 1),
        "class_sliced": torch.randn(7, 20)[:, 3:17:2],
        "row_sliced": torch.randn(20, 7)[3::4],
        "offset": torch.randn(8, 9)[1:, 2:],
        "spatial_sliced": base[:, 1:, 1:4:2, ::3],
        "channels_last_sliced": base.contiguous(memory_format=torch.channels_last)[:, 1:, :, 2:6],
        "expanded_rows": torch.randn(1, 6).expand(5, 6),
        "expanded_classes": torch.randn(5, 1).expand(5, 6),
        "expanded_everything": torch.randn(()).expand(3, 4, 2),
        "overlapping": wide.as_strided((5, 6), (2, 1)),
        "odd_row_stride": wide.as_strided((8, 16), (17, 1), 1),
        "swapped_strides": wide.as_strided((8, 16), (1, 9), 3),
        "one_dimension_strided": wide[5:29:4],
        "channels_last_3d": torch.randn(2, 6, 2, 3, 2).contiguous(memory_format=torch.channels_last_3d),
        "one_row_of_odd_stride": wide.as_strided((1, 6), (1, 1)),
        "one_class_of_odd_stride": wide.as_strided((6, 1, 2), (2, 999, 1)),
    }


@pairs(name=list(_layouts()), dtype=(torch.float32, torch.bfloat16), reduction=("none", "mean"))
def test_strides(name, dtype, reduction, backend):
    logits = _layouts()[name]
    if dtype != torch.float32:  # the same strides in the other dtype
        storage = torch.randn(logits.untyped_storage().nbytes() // 4).to(dtype)
        logits = storage.as_strided(logits.shape, logits.stride(), logits.storage_offset())
    target = target_of(logits)
    outer = torch.rand(target.shape if reduction == "none" else ())
    check(logits, target, backend, outer, reduction=reduction, margins=torch.rand(_classes(logits)))


def _classes(logits):
    return logits.shape[0] if logits.dim() == 1 else logits.shape[1]


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "offset"])
def test_target_strides(how, backend):
    target = {
        "transposed": torch.randint(0, 6, (5, 4)).t(),
        "sliced": torch.randint(0, 6, (8, 10))[::2, 1::2],
        "expanded": torch.tensor([[1], [2], [3], [5]]).expand(4, 5),
        "offset": torch.randint(0, 6, (5, 7))[1:, 2:],
    }[how]
    assert target.shape == (4, 5)
    check(torch.randn(4, 6, 5), target, backend, torch.rand(4, 5), reduction="none")
    check(torch.randn(4, 5, 6).movedim(-1, 1), target, backend)


@pytest.mark.parametrize("which", ["margins", "weight", "ldam_weight", "focal_weight"])
@pytest.mark.parametrize("how", ["sliced", "expanded", "reversed", *DTYPES])
def test_vectors_of_any_stride_and_dtype(which, how, backend):
    values = torch.rand(12) + 0.1
    vector = {
        "sliced": lambda: values[1::2],
        "expanded": lambda: values[:1].expand(6),
        "reversed": lambda: values[:6].flip(0),
    }.get(how, lambda: values[:6].to(how))()
    z, y = torch.randn(9, 6), torch.randint(0, 6, (9,))
    check(z, y, backend, **{which: vector})
    check(z.double(), y, backend, **{which: vector})
    check(z.bfloat16(), y, backend, **{which: vector})


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0), (2, 3, 4, 0), (0, 3, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty(shape, reduction, backend):
    check(torch.randn(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.long), backend, reduction=reduction)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 6, 3, 4)])
def test_uint8_labels(shape, backend):
    logits = torch.randn(shape)
    target = target_of(logits)
    check(logits, target.to(torch.uint8), backend)
    if target.dim():
        target.view(-1)[0] = 255
        check(logits, target.to(torch.uint8), backend, ignore_index=255)


def test_gradient_of_expanded_logits_reaches_their_base(backend):
    base, y = torch.randn(1, 6, requires_grad=True), torch.randint(0, 6, (5,))
    lmf_loss(base.expand(5, 6), y, backend=backend).backward()
    assert_exact(base.grad, expected(base.expand(5, 6), y)[1].sum(0, keepdim=True))


def test_gradient_with_parts_that_do_not_require_it(backend):
    """A view of a larger tensor: the rest of it gets exact zeros."""
    z, y = torch.randn(4, 10, requires_grad=True), torch.randint(0, 6, (4,))
    lmf_loss(z[:, 2:8], y, backend=backend).backward()
    assert (z.grad[:, :2] == 0).all() and (z.grad[:, 8:] == 0).all()
    assert_exact(z.grad[:, 2:8], expected(z[:, 2:8], y)[1])


@pytest.mark.parametrize("stride", [(2**31 + 8, 1), (1, 2**31 // 8 + 1), (2**30, 2**29)])
def test_offsets_beyond_32_bits(stride, backend):
    """A few elements spread over more than 2^31: the pages between are never touched."""
    rows, classes = 2, 9
    size = (rows - 1) * stride[0] + (classes - 1) * stride[1] + 1
    assert size > 2**31
    try:
        memory = torch.empty(size, dtype=torch.bfloat16)
    except RuntimeError:  # Linux promises no more at once than the machine has
        pytest.skip(f"needs a machine with {2 * size >> 30} GB of memory, though not that it is free")
    logits = memory.as_strided((rows, classes), stride)
    logits.copy_(torch.randn(rows, classes))
    check(logits, torch.tensor([8, 3]), backend, torch.rand(2), reduction="none")


def free_memory():
    """Bytes that a large test may take; Linux's estimate within a container's limit, elsewhere all there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # which the estimate does not know; beyond it: killed
        with contextlib.suppress(OSError, ValueError):  # no such file, "max"
            free = min(free, int((CGROUP / limit).read_text()))
    return free


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="millions of rows take the interpreter days")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape, period", [((2**16 + 4, 2**15), 4), ((2**28 + 32, 8), 32)], ids=["wide", "narrow"])
def test_more_than_32_bits_of_elements(shape, period, reduction):
    """Dense bfloat16 logits, a few rows over and over, so that the oracle need not see more than those."""
    rows, classes = shape
    assert rows * classes > 2**31 and rows % period == 0
    needed = 2 * 2 * rows * classes + (5 + 2 * (reduction == "none")) * 4 * rows + 8 * rows + 2**30
    if free_memory() < needed:
        pytest.skip(f"needs {needed >> 30} GB of free memory")
    block, labels = torch.randn(period, classes).bfloat16(), torch.randint(0, classes, (period,))
    labels[1] = -100
    logits = torch.empty(shape, dtype=torch.bfloat16)
    logits.view(-1, period, classes)[:] = block
    target = labels.repeat(rows // period)
    exact_loss, exact_grad = expected(block, labels, s=1.0, reduction=reduction)

    loss = lmf_loss(logits.requires_grad_(), target, s=1.0, reduction=reduction, backend="native")
    outer = torch.ones(()).expand(loss.shape)
    if reduction == "none":
        assert_exact(loss.detach()[:period], exact_loss)
        assert (loss.detach().view(-1, period) == loss.detach()[:period]).all()
    else:
        assert_exact(loss.detach(), exact_loss)
        outer = outer * float(2**24)  # else the gradients of a mean over so many rows leave bfloat16's normal range
    (grad,) = torch.autograd.grad(loss, logits, outer)
    scale = 1.0 if reduction == "none" else 2.0**24 * period / rows
    assert_exact(grad[:period], exact_grad * scale)
    for part in grad.view(-1, period, classes).split(max(1, 2**27 // (period * classes))):
        assert torch.equal(part, grad[:period].expand_as(part))
