"""The cases that the emulated Triton and CUDA kernels are both held to: layouts, shapes, dtypes, architectures."""

from __future__ import annotations

import torch
from torch import Tensor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def layouts(how: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random logits of the shape in some memory layout."""
    rows, classes, *inner = shape
    if how == "contiguous":
        return torch.randn(shape).to(dtype)
    if how == "channels_last":
        return torch.randn(shape).to(dtype, memory_format=torch.channels_last)
    if how == "transposed":
        return torch.randn(classes, rows).to(dtype).t()
    if how == "padded":
        return torch.randn(rows, classes + 8).to(dtype)[:, :classes]
    if how == "unaligned":
        return torch.randn(rows * classes + 1).to(dtype)[1:].view(rows, classes)
    if how == "shifted":  # as in language models: (N, L + 1, C) -> (N, C, L)
        return torch.randn(rows, inner[0] + 1, classes).to(dtype)[:, :-1].transpose(1, 2)
    if how == "crop":
        height, width = inner
        return torch.randn(rows, classes, height + 3, width + 5).to(dtype)[:, :, 1:-2, 2:-3]
    assert how == "volume crop"  # four levels: copied
    return torch.randn(rows, classes, *(size + 2 for size in inner)).to(dtype)[:, :, 1:-1, 1:-1, 1:-1]


def labels(logits: Tensor, bad: bool = True) -> Tensor:
    target = torch.randint(0, logits.shape[1], (logits.shape[0], *logits.shape[2:]))
    flat = target.view(-1)
    flat[::7] = -100
    if bad and flat.numel() > 4:
        flat[1], flat[3] = logits.shape[1], 2**40
    return target


# layout, shape, dtype, sm_
CASES = [
    # few classes
    ("contiguous", (131, 7), F32, 90), ("contiguous", (300, 7), BF16, 80), ("contiguous", (70, 2), F16, 100),
    ("contiguous", (131, 8), F32, 100), ("contiguous", (131, 8), BF16, 90), ("contiguous", (67, 21), F16, 90),
    ("contiguous", (33, 64), F32, 80), ("contiguous", (130, 1), F32, 90), ("padded", (37, 7), BF16, 90),
    ("unaligned", (140, 7), F32, 90),
    # middle
    ("contiguous", (37, 100), BF16, 90), ("contiguous", (9, 1000), F32, 100), ("contiguous", (11, 1001), F16, 90),
    ("unaligned", (9, 1000), BF16, 90), ("padded", (5, 3000), F32, 80),
    # large
    ("contiguous", (3, 20000), BF16, 90),
    # a strided class axis
    ("contiguous", (2, 5, 9, 8), F32, 90), ("contiguous", (2, 21, 33, 2), BF16, 90),
    ("contiguous", (3, 12, 5), F32, 80),
    ("contiguous", (2, 40, 64), F16, 100), ("transposed", (45, 12), F32, 90), ("channels_last", (2, 5, 6, 7), BF16, 90),
    ("shifted", (3, 50, 9), F32, 90), ("crop", (2, 6, 9, 40), BF16, 90), ("volume crop", (2, 3, 3, 4, 5), F32, 90),
]  # fmt: skip


def misaligned(logits: Tensor) -> Tensor:
    """The same values and strides, one element further in memory."""
    offset = logits.storage_offset()
    span = sum((size - 1) * step for size, step in zip(logits.shape, logits.stride(), strict=True)) + 1
    moved = logits.new_zeros(offset + span + 1).as_strided(logits.shape, logits.stride(), offset + 1)
    return moved.copy_(logits)
