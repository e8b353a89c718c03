# mypy: allow-untyped-defs
"""Sums of rows over a slice of their classes in Triton: eq. 1 alone, by the walk of kernels.py."""

import triton
import triton.language as tl

from .kernels import _load_labels, _offset, _place, _row_sums, _sizes, _strides


@triton.jit
def _local_labels(target, first_class, ignore_index, place, sizes, strides, TILE: tl.constexpr):
    """Labels counted from first_class, and -1 for ignored rows."""
    y = _load_labels(target, place, sizes, strides, TILE)
    return tl.where(y == ignore_index, -1, y - first_class)


@triton.jit(
    do_not_specialize=["first_class", "ignore_index", "rows", "middle", "inner", "stride_0", "stride_1", "target_0"]
)
def sums_kernel(
    logits, target, sums, first_class: tl.int64, ignore_index: tl.int64, s: tl.float64,
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
    y = _local_labels(target, first_class, ignore_index, lanes, sizes, y_strides, TILE)
    m, t1, t2, z_y = _row_sums(logits, y, lanes, unit, 0, s, sizes, z_strides, TILE, TERMS)
    place = _place(unit, tl.arange(0, TILE.RT), 0, 1, sizes, TILE)
    row, _, _, exists = place
    if TILE.LPR > 1 and TILE.C > TILE.K * TILE.LPR * TILE.V:  # a long row: one more element is less work than a search
        y = _local_labels(target, first_class, ignore_index, place, sizes, y_strides, TILE)
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
