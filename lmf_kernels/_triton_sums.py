# mypy: allow-untyped-defs
"""Sums of rows over a slice of their classes in Triton: eq. 1 alone, by the walk of `_triton_kernels`."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton
from ._triton_kernels import _load_labels, _offset, _place, _row_sums, _sizes, _strides
from .reference import SUM


@triton.jit(do_not_specialize=["rows", "middle", "inner", "stride_0", "stride_1", "target_0"])
def sums_kernel(
    logits, target, sums, s: tl.float64,
    rows, middle, inner, stride_0, stride_1, stride_2, stride_c, target_0, target_1, target_2,
    TILE: tl.constexpr, TERMS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Stores m, t1, t2, z_y (4, rows); a program takes a tile of rows. z_y = 0 where the label is not in [0, C)."""
    acc: tl.constexpr = sums.dtype.element_ty
    s = tl.full((), s, acc)
    sizes = _sizes(rows, middle, inner, TILE)
    z_strides = _strides(stride_0, stride_1, stride_2, stride_c, TILE)
    y_strides = target_0, target_1, target_2
    unit = tl.program_id(0)
    lanes = _place(unit, tl.arange(0, TILE.RT * TILE.LPR) // TILE.LPR, 0, 1, sizes, TILE)
    y = _load_labels(target, lanes, sizes, y_strides, TILE)
    m, t1, t2, z_y = _row_sums(logits, y, lanes, unit, 0, s, sizes, z_strides, TILE, TERMS)
    place = _place(unit, tl.arange(0, TILE.RT), 0, 1, sizes, TILE)
    row, _, _, exists = place
    if TILE.LPR > 1 and TILE.C > TILE.K * TILE.LPR * TILE.V:  # a long row: one more element is less work than a search
        y = _load_labels(target, place, sizes, y_strides, TILE)
        stride_0, stride_1, stride_2, stride_c = z_strides
        at = logits + _offset(place, sizes, stride_0, stride_1, stride_2, TILE) + y * stride_c
        z_y = tl.load(at, mask=exists & (y >= 0) & (y < TILE.C), other=0.0).to(acc)
    if not TERMS.t1:
        t1 = t2
    if not TERMS.t2:
        t2 = t1
    at = sums + row
    stride = sizes[0].to(tl.int64)
    tl.store(at, m, mask=exists)
    tl.store(at + stride, t1, mask=exists)
    tl.store(at + 2 * stride, t2, mask=exists)
    tl.store(at + 3 * stride, z_y, mask=exists)


def sums(
    logits: Tensor,
    target: Tensor,
    first_class: int,
    alpha: float,
    beta: float,
    gamma: float,
    s: float,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """m, t1, t2, z_y (4, rows) over the classes [first_class, first_class + C), in one launch."""
    device = _triton._device(logits.device)
    # Labels of other slices and of ignored rows are in no class here, wherever the subtraction takes them.
    local = (target - first_class).masked_fill_(target == ignore_index, -1)
    plan = _plan(logits.shape, logits.stride(), local.stride(), logits.element_size(), device)
    if plan is None:
        return sums(
            logits.contiguous(), target.contiguous(), first_class, alpha, beta, gamma, s, ignore_index, reduction
        )
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    result = torch.empty((4, plan.rows), dtype=acc, device=logits.device)
    if plan.rows:
        with device.made_current():
            tensors = logits, local, result
            terms = _triton._terms(alpha, beta, s)
            _triton._launch(sums_kernel, device, plan, tensors, (s, *plan.arguments), terms, SUM)
    return result


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    itemsize: int,
    device: "_triton._Device",
) -> "_triton._Plan | None":
    levels = _triton._levels(shape[:1] + shape[2:], strides[:1] + strides[2:], target_strides)
    if levels is None:
        return None
    tile = _triton._tile(shape[1], levels, (strides[1],), itemsize, device)
    arguments = (levels.rows, levels.middle, levels.inner, *levels.strides[0], strides[1], *levels.strides[1])
    options = _triton._forward_options(tile, device)
    return _triton._Plan(levels.rows, _triton._units(levels, tile), options, tile, arguments, {})
