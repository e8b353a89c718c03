"""The Triton kernels of the LMF loss, one forward and one backward. launch.py launches them.

Names and equations are those of reference.py. One kernel body serves every regime, because in all of them the work is
the same tile of logits (K, L, V): L lanes, each of which owns K * V classes of one row, so that sums over classes stay
inside a thread and the lanes of a row are combined once.

    L = RT * LPR                    RT rows, LPR lanes a row
    class of element (k, l, v)      k * LPR * V + l % LPR * V + v: V neighbours, one wide load
    LPR = V = 1                     a lane owns a row: few classes, or a class axis that is strided

Rows are numbered as in the target, and lie in memory in up to three levels (`_place`). Offsets are 64-bit.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .math import NEG_INF, _accumulate, _add4, _combine, _exp, _finish_rows, _lane_sum, _or_zero, _round

NONE, MEAN, SUM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Tile(NamedTuple):
    """The shape of the work; see the top of this file."""

    C: int
    K: int
    LPR: int
    V: int
    RT: int
    chunk: int  # classes that a program walks over; fewer than C where rows are split
    levels: int  # memory levels of the rows
    inner_tiles: bool  # a tile lies within the last level, so that neighbouring lanes are neighbours in memory
    flat: bool  # contiguous rows that are loaded (and stored) flat
    align: int  # elements of a wide load, along the classes (then it is V) or along the rows; strides are its multiples


# ---- where rows and classes are -------------------------------------------------------------------------------------
@triton.jit
def _multiple(n, TILE: tl.constexpr):
    """The same n, known to the compiler to be a multiple of `align`."""
    return n // TILE.align * TILE.align


@triton.jit
def _strides(stride_0, stride_1, stride_2, stride_c, TILE: tl.constexpr):
    if TILE.V > 1:
        stride_2 = _multiple(stride_2, TILE)
    else:
        stride_c = _multiple(stride_c, TILE)
    return _multiple(stride_0, TILE), _multiple(stride_1, TILE), stride_2, stride_c


@triton.jit
def _sizes(rows, middle, inner, TILE: tl.constexpr):
    if TILE.V == 1:
        rows = _multiple(rows, TILE)
        inner = _multiple(inner, TILE)
    return rows, middle, inner


@triton.jit
def _numbered(row, sizes):
    """(row, outer, i_2, exists) of rows by their number, int64."""
    rows, _, inner = sizes
    return row, row // inner, row % inner, row < rows


@triton.jit
def _place(unit, i, n, sub, sizes, TILE: tl.constexpr):
    """(row, outer, i_2, exists) of the rows (unit * RT + i) * sub + n.

    row = outer * inner + i_2 and outer = i_0 * middle + i_1, with sizes = (rows, middle, inner).
    """
    _, _, inner = sizes
    if TILE.inner_tiles:
        tiles = tl.cdiv(inner, TILE.RT)
        outer = tl.cast(unit // tiles, tl.int64)
        i_2 = unit % tiles * TILE.RT + i
        return outer * inner + i_2, outer, i_2.to(tl.int64), i_2 < inner
    else:
        return _numbered((tl.cast(unit, tl.int64) * TILE.RT + i) * sub + n, sizes)


@triton.jit
def _offset(place, sizes, stride_0, stride_1, stride_2, TILE: tl.constexpr):
    """Memory offset i_0 * stride_0 + i_1 * stride_1 + i_2 * stride_2 of each row."""
    row, outer, i_2, _ = place
    if TILE.levels == 1:
        return row * stride_2
    elif TILE.levels == 2:
        return outer * stride_1 + i_2 * stride_2
    else:
        _, middle, _ = sizes
        return outer // middle * stride_0 + outer % middle * stride_1 + i_2 * stride_2


@triton.jit
def _load_labels(target, place, sizes, strides, TILE: tl.constexpr):
    stride_0, stride_1, stride_2 = strides
    _, _, _, exists = place
    return tl.load(target + _offset(place, sizes, stride_0, stride_1, stride_2, TILE), mask=exists, other=-1)


@triton.jit
def _class_or_none(y, TILE: tl.constexpr):
    """Labels as int32, -1 for those that are not classes."""
    return tl.where((y >= 0) & (y < TILE.C), y, -1).to(tl.int32)


@triton.jit
def _classes(TILE: tl.constexpr):
    """Class of each element of a tile (K, L, V), counted from the tile's first class."""
    k = tl.arange(0, TILE.K)[:, None, None]
    lane = tl.arange(0, TILE.RT * TILE.LPR)[None, :, None] % TILE.LPR
    return k * (TILE.LPR * TILE.V) + (lane * TILE.V + tl.arange(0, TILE.V)[None, None, :])


@triton.jit
def _load_flat(logits, unit, sizes, TILE: tl.constexpr):
    """(K, RT, 1) logits of contiguous rows: wide loads over the flat tile, then each row to its lane."""
    rows, _, _ = sizes
    first_row = tl.cast(unit, tl.int64) * TILE.RT
    logits += first_row * TILE.C
    i = tl.arange(0, TILE.RT * TILE.K)
    if first_row + TILE.RT <= rows:
        flat = tl.load(logits + i, mask=i < TILE.RT * TILE.C)
    else:  # a mask that may end anywhere makes narrow loads
        flat = tl.load(logits + i, mask=i < (rows - first_row).to(tl.int32) * TILE.C)
    at = tl.arange(0, TILE.RT)[None, :] * TILE.C + tl.arange(0, TILE.K)[:, None]
    return tl.reshape(tl.gather(flat, tl.reshape(at, [TILE.K * TILE.RT]), 0), [TILE.K, TILE.RT, 1])


@triton.jit
def _load_tile(logits, offset, first_class, end_class, stride_c, exists, unit, sizes, TILE: tl.constexpr):
    """(K, L, V) logits of the classes from first_class; anything from end_class on and where there is no row."""
    if TILE.flat:
        return _load_flat(logits, unit, sizes, TILE)
    else:
        classes = first_class + _classes(TILE)
        at = logits + offset[None, :, None] + classes.to(tl.int64) * stride_c
        return tl.load(at, mask=(classes < end_class) & exists[None, :, None])


# ---- forward --------------------------------------------------------------------------------------------------------
@triton.jit
def _row_sums(logits, y, place, unit, first_class, s, sizes, z_strides, TILE: tl.constexpr, TERMS: tl.constexpr):
    """m, t1, t2 (RT,) over the chunk of classes from first_class; z_y, but not of long rows; y, place: of each lane."""
    acc: tl.constexpr = s.dtype
    L: tl.constexpr = TILE.RT * TILE.LPR
    STEP: tl.constexpr = TILE.K * TILE.LPR * TILE.V
    stride_0, stride_1, stride_2, stride_c = z_strides
    offset = _offset(place, sizes, stride_0, stride_1, stride_2, TILE)
    _, _, _, exists = place
    y = _class_or_none(y, TILE)
    zero = tl.zeros([L], acc)
    m, t1, t2, z_y = tl.full([L], NEG_INF, acc), zero, zero, zero
    end = TILE.C
    if TILE.chunk < TILE.C:
        end = tl.minimum(first_class + TILE.chunk, TILE.C)
    for step in range(0, TILE.chunk, STEP):
        z = _load_tile(logits, offset, first_class + step, end, stride_c, exists, unit, sizes, TILE).to(acc)
        classes = first_class + step + _classes(TILE)
        is_target = classes == y[None, :, None]
        if TILE.LPR == 1 or TILE.C <= STEP:
            z_y += _lane_sum(tl.where(is_target, z, 0.0))
        z = tl.where((classes < TILE.C) & (classes != y[None, :, None]), z, NEG_INF)
        m, t1, t2 = _accumulate(z, m, t1, t2, s, TERMS, TILE.chunk <= STEP)
    if TILE.LPR > 1:
        lanes: tl.constexpr = [TILE.RT, TILE.LPR]
        m, t1, t2, z_y = _combine(
            tl.reshape(m, lanes), tl.reshape(t1, lanes), tl.reshape(t2, lanes), tl.reshape(z_y, lanes), s, TERMS
        )
    return m, t1, t2, z_y


@triton.jit
def _unit_sums(logits, target, unit, sub, s, sizes, z_strides, y_strides, TILE: tl.constexpr, TERMS: tl.constexpr):
    """The sums of RT * sub rows, RT of them at a time: the n-th lane (RT, LPR) of a row ends up with its n-th row."""
    lanes: tl.constexpr = [TILE.RT, TILE.LPR]
    lane = tl.arange(0, TILE.RT * TILE.LPR)
    zero = tl.zeros(lanes, s.dtype)
    m, t1, t2, z_y = zero, zero, zero, zero
    for n in range(0, sub):
        place = _place(unit, lane // TILE.LPR, n, sub, sizes, TILE)
        y = _load_labels(target, place, sizes, y_strides, TILE)
        m_n, t1_n, t2_n, z_y_n = _row_sums(logits, y, place, unit, 0, s, sizes, z_strides, TILE, TERMS)
        here = tl.arange(0, TILE.LPR)[None, :] == n
        m = tl.where(here, m_n[:, None], m)
        t1 = tl.where(here, t1_n[:, None], t1)
        t2 = tl.where(here, t2_n[:, None], t2)
        z_y = tl.where(here, z_y_n[:, None], z_y)
    return m, t1, t2, z_y


@triton.jit
def _store_rows(
    m, t1, t2, z_y, y, place, logits, loss, saved, tables, options, ignore_index, sizes, z_strides,
    TILE: tl.constexpr, TERMS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Stores what rows save for backward; returns their parts of the sums over all rows."""
    acc: tl.constexpr = m.dtype
    rows, _, _ = sizes
    row, _, _, exists = place
    kept = exists & (y != ignore_index)
    valid = kept & (y >= 0) & (y < TILE.C)
    if TILE.LPR > 1 and TILE.C > TILE.K * TILE.LPR * TILE.V:  # a long row: one more element is less work than a search
        stride_0, stride_1, stride_2, stride_c = z_strides
        at = logits + _offset(place, sizes, stride_0, stride_1, stride_2, TILE) + y * stride_c
        z_y = tl.load(at, mask=valid, other=0.0).to(acc)
    ldam, focal, w_ldam, c1, c2, g1, g2 = _finish_rows(m, t1, t2, z_y, y, kept, valid, tables, options, TERMS)
    at = saved + row
    stride = rows.to(tl.int64)
    tl.store(at, _or_zero(m), mask=exists)
    tl.store(at + stride, c1, mask=exists)
    tl.store(at + 2 * stride, c2, mask=exists)
    tl.store(at + 3 * stride, g1, mask=exists)
    tl.store(at + 4 * stride, g2, mask=exists)
    if REDUCTION == NONE:
        alpha, beta, _, _ = options
        tl.store(loss + row, alpha * ldam + beta * focal, mask=exists)
    kept = kept.to(acc)
    if TILE.LPR == 1 and TILE.align > TILE.V:  # neighbouring rows of a thread together
        pairs: tl.constexpr = [TILE.RT // TILE.align, TILE.align]
        ldam, focal = tl.sum(tl.reshape(ldam, pairs), 1), tl.sum(tl.reshape(focal, pairs), 1)
        w_ldam, kept = tl.sum(tl.reshape(w_ldam, pairs), 1), tl.sum(tl.reshape(kept, pairs), 1)
    return ldam, focal, w_ldam, kept


@triton.jit
def _arrive(counter):
    """Whether this program is the last to arrive; what the others stored before is then visible past L1."""
    tl.debug_barrier()  # one thread does the atomic: before it, all threads of the program have stored
    return tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def _add_partials(partials, programs, acc: tl.constexpr):
    """The sums over all programs, always in the same order."""
    B: tl.constexpr = 512
    zero = tl.zeros([B], acc)
    ldam, focal, weight, kept = zero, zero, zero, zero
    for first in range(0, programs, B):
        i = first + tl.arange(0, B)
        here = i < programs
        ldam += tl.load(partials + i, mask=here, other=0.0, cache_modifier=".cg")
        focal += tl.load(partials + programs + i, mask=here, other=0.0, cache_modifier=".cg")
        weight += tl.load(partials + 2 * programs + i, mask=here, other=0.0, cache_modifier=".cg")
        kept += tl.load(partials + 3 * programs + i, mask=here, other=0.0, cache_modifier=".cg")
    return ldam, focal, weight, kept


@triton.jit
def _store_loss(
    ldam, focal, weight, kept, loss, denominators, normalizers, options, TERMS: tl.constexpr, REDUCTION: tl.constexpr
):
    """The loss from parts (n,) of the sums over all rows."""
    alpha, beta, _, _ = options
    ldam, focal, weight, kept = tl.reduce((ldam, focal, weight, kept), 0, _add4)
    if REDUCTION == MEAN:
        ldam_normalizer, focal_normalizer = normalizers
        if ldam_normalizer is not None:
            weight = tl.load(ldam_normalizer).to(ldam.dtype)
        if focal_normalizer is not None:
            kept = tl.load(focal_normalizer).to(ldam.dtype)
        tl.store(denominators, weight)
        tl.store(denominators + 1, kept)
        ldam /= weight
        focal /= kept
    value = tl.zeros((), ldam.dtype)
    if TERMS.ldam:
        value += alpha * ldam
    if TERMS.focal:
        value += beta * focal
    tl.store(loss, value)


@triton.jit
def _finish_split(
    partials, programs, logits, target, loss, saved, denominators, normalizers, tables, options, ignore_index,
    sizes, z_strides, y_strides, TILE: tl.constexpr, TERMS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """All rows from the sums of their chunks, and the loss."""
    CHUNKS: tl.constexpr = triton.cdiv(TILE.C, TILE.chunk)
    PARTS: tl.constexpr = triton.next_power_of_2(CHUNKS)
    # A thread for each of the B * PARTS sums, 16 rows at least. Not max(): Triton 3.4 makes it a run-time value.
    B: tl.constexpr = TILE.LPR // PARTS if TILE.LPR // PARTS > 16 else 16
    rows, _, inner = sizes
    _, _, _, s = options
    acc: tl.constexpr = s.dtype
    zero = tl.zeros([B], acc)
    ldam, focal, weight, kept = zero, zero, zero, zero
    chunk = tl.arange(0, PARTS)[None, :]
    for first in range(0, tl.cast(rows, tl.int32), B):
        row = first + tl.arange(0, B).to(tl.int64)
        place = row, row // inner, row % inner, row < rows
        here = (row < rows)[:, None] & (chunk < CHUNKS)
        at = partials + row[:, None] * CHUNKS + chunk
        m = tl.load(at, mask=here, other=NEG_INF, cache_modifier=".cg")
        t1 = tl.load(at + programs, mask=here, other=0.0, cache_modifier=".cg")
        t2 = tl.load(at + 2 * programs, mask=here, other=0.0, cache_modifier=".cg")
        m, t1, t2, z_y = _combine(m, t1, t2, tl.zeros(m.shape, acc), s, TERMS)
        y = _load_labels(target, place, sizes, y_strides, TILE)
        ldam_part, focal_part, weight_part, kept_part = _store_rows(
            m, t1, t2, z_y, y, place, logits, loss, saved, tables, options, ignore_index, sizes, z_strides,
            TILE, TERMS, REDUCTION,
        )  # fmt: skip
        ldam += ldam_part
        focal += focal_part
        weight += weight_part
        kept += kept_part
    if REDUCTION != NONE:
        _store_loss(ldam, focal, weight, kept, loss, denominators, normalizers, options, TERMS, REDUCTION)


@triton.jit(do_not_specialize=["rows", "middle", "inner", "stride_0", "stride_1", "target_0", "sub"])
def forward_kernel(
    logits, target, margins, ldam_weight, focal_weight, ldam_normalizer, focal_normalizer,
    loss, saved, denominators, partials, counter,
    alpha: tl.float64, beta: tl.float64, gamma: tl.float64, s: tl.float64, ignore_index: tl.int64,
    rows, middle, inner, stride_0, stride_1, stride_2, stride_c, target_0, target_1, target_2, sub,
    TILE: tl.constexpr, TERMS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Stores loss, saved (5, rows) and denominators (2,).

    Where something remains to be done with all programs' results, each leaves up to four sums in `partials`, and the
    last one to arrive at `counter` does it. It also sets the counter back to zero for the next launch.
    """
    acc: tl.constexpr = saved.dtype.element_ty
    options = tl.full((), alpha, acc), tl.full((), beta, acc), tl.full((), gamma, acc), tl.full((), s, acc)
    s = tl.full((), s, acc)
    tables = margins, ldam_weight, focal_weight
    normalizers = ldam_normalizer, focal_normalizer
    sizes = _sizes(rows, middle, inner, TILE)
    z_strides = _strides(stride_0, stride_1, stride_2, stride_c, TILE)
    y_strides = target_0, target_1, target_2
    program, programs = tl.program_id(0), tl.num_programs(0)

    if TILE.chunk < TILE.C:  # rows are split; the last program finishes them
        CHUNKS: tl.constexpr = triton.cdiv(TILE.C, TILE.chunk)
        place = _place(program // CHUNKS, tl.arange(0, TILE.LPR) // TILE.LPR, 0, 1, sizes, TILE)  # RT is 1
        y = _load_labels(target, place, sizes, y_strides, TILE)
        m, t1, t2, _ = _row_sums(
            logits, y, place, program // CHUNKS, program % CHUNKS * TILE.chunk, s, sizes, z_strides, TILE, TERMS
        )
        at = partials + program + tl.arange(0, TILE.RT)
        tl.store(at, m)
        tl.store(at + programs, t1)
        tl.store(at + 2 * programs, t2)
        if _arrive(counter):
            _finish_split(
                partials, programs, logits, target, loss, saved, denominators, normalizers, tables, options,
                ignore_index, sizes, z_strides, y_strides, TILE, TERMS, REDUCTION,
            )  # fmt: skip
            tl.store(counter, 0)
    else:
        PARTS: tl.constexpr = [TILE.RT, TILE.LPR] if TILE.LPR > 1 else [TILE.RT * TILE.V // TILE.align]
        zero = tl.zeros(PARTS, acc)
        ldam, focal, weight, kept = zero, zero, zero, zero
        if TILE.inner_tiles:
            units = (rows // inner * tl.cdiv(inner, TILE.RT)).to(tl.int32)
        else:
            units = tl.cdiv(rows, TILE.RT * sub).to(tl.int32)
        for unit in range(program, units, programs):
            if TILE.LPR == 1:
                place = _place(unit, tl.arange(0, TILE.RT), 0, 1, sizes, TILE)
                y = _load_labels(target, place, sizes, y_strides, TILE)
                m, t1, t2, z_y = _row_sums(logits, y, place, unit, 0, s, sizes, z_strides, TILE, TERMS)
            else:
                m, t1, t2, z_y = _unit_sums(logits, target, unit, sub, s, sizes, z_strides, y_strides, TILE, TERMS)
                n = tl.arange(0, TILE.LPR)[None, :]
                row, outer, i_2, exists = _place(unit, tl.arange(0, TILE.RT)[:, None], n, sub, sizes, TILE)
                place = row, outer, i_2, exists & (n < sub)
                y = _load_labels(target, place, sizes, y_strides, TILE)
            ldam_part, focal_part, weight_part, kept_part = _store_rows(
                m, t1, t2, z_y, y, place, logits, loss, saved, tables, options, ignore_index, sizes, z_strides,
                TILE, TERMS, REDUCTION,
            )  # fmt: skip
            ldam += ldam_part
            focal += focal_part
            weight += weight_part
            kept += kept_part
        if REDUCTION != NONE:
            if TILE.LPR > 1:
                ldam, focal, weight, kept = tl.reduce((ldam, focal, weight, kept), 1, _add4)
            ldam_sum, focal_sum, weight_sum, kept_sum = tl.reduce((ldam, focal, weight, kept), 0, _add4)
            at = partials + program
            tl.store(at, ldam_sum)
            tl.store(at + programs, focal_sum)
            tl.store(at + 2 * programs, weight_sum)
            tl.store(at + 3 * programs, kept_sum)
            if _arrive(counter):
                ldam_parts, focal_parts, weight_parts, kept_parts = _add_partials(partials, programs, acc)
                _store_loss(
                    ldam_parts, focal_parts, weight_parts, kept_parts, loss, denominators, normalizers, options, TERMS,
                    REDUCTION,
                )  # fmt: skip
                tl.store(counter, 0)


# ---- backward, eq. 8 ------------------------------------------------------------------------------------------------
@triton.jit
def _times(r, c):
    """r * c, but 0 for c = 0: a term without gradient does not care for its denominator."""
    return tl.where(c == 0, 0.0, r * c)


@triton.jit
def _gradient(z, m, rc1, rc2, is_target, grad_y, s, TERMS: tl.constexpr):
    """Eq. 8 for elements z, in their dtype; rc1 = r1 c1, rc2 = r2 c2."""
    d = z.to(m.dtype) - m
    grad = tl.zeros(d.shape, d.dtype)
    if TERMS.t1:
        grad += rc1 * _exp(d, 1.0)
    if TERMS.t2:
        grad += rc2 * _exp(d, s)
    grad = tl.where(is_target, grad_y, grad)
    live = tl.abs(rc1) + tl.abs(rc2) != 0  # the others get zeros whatever they hold: no 0 * NaN
    return _round(tl.where(live, grad, 0.0), z.dtype)


@triton.jit(
    do_not_specialize=["rows", "middle", "inner", "stride_0", "stride_1", "grad_0", "grad_1", "target_0", "outer_0"]
)
def backward_kernel(
    grad_output, logits, target, saved, denominators, grad_logits, s: tl.float64,
    rows, middle, inner, stride_0, stride_1, stride_2, stride_c, grad_0, grad_1, grad_2, grad_c,
    target_0, target_1, target_2, outer_0, outer_1, outer_2,
    TILE: tl.constexpr, TERMS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Stores grad_logits; a program takes a tile of rows and a chunk of their classes."""
    acc: tl.constexpr = saved.dtype.element_ty
    L: tl.constexpr = TILE.RT * TILE.LPR
    CHUNKS: tl.constexpr = triton.cdiv(TILE.C, TILE.chunk)
    s = tl.full((), s, acc)
    rows, middle, inner = _sizes(rows, middle, inner, TILE)
    sizes = rows, middle, inner
    stride_0, stride_1, stride_2, stride_c = _strides(stride_0, stride_1, stride_2, stride_c, TILE)
    grad_0, grad_1, grad_2, grad_c = _strides(grad_0, grad_1, grad_2, grad_c, TILE)
    program = tl.program_id(0)
    unit = program // CHUNKS
    if TILE.flat:
        first = tl.cast(program, tl.int64) * (L * TILE.K)
        place = _numbered(first // TILE.C + tl.arange(0, L), sizes)
    else:
        place = _place(unit, tl.arange(0, L) // TILE.LPR, 0, 1, sizes, TILE)
    row, _, _, exists = place
    offset = _offset(place, sizes, stride_0, stride_1, stride_2, TILE)
    grad_offset = _offset(place, sizes, grad_0, grad_1, grad_2, TILE)
    y = _class_or_none(_load_labels(target, place, sizes, (target_0, target_1, target_2), TILE), TILE)

    if REDUCTION == NONE:
        at = grad_output + _offset(place, sizes, outer_0, outer_1, outer_2, TILE)
        r1 = tl.load(at, mask=exists, other=0.0).to(acc)
        r2 = r1
    else:
        r1 = tl.load(grad_output).to(acc)
        r2 = r1
    if REDUCTION == MEAN:
        r1 /= tl.load(denominators + 1)
        r2 /= tl.load(denominators)

    at = saved + row
    stride = rows.to(tl.int64)
    m = tl.load(at, mask=exists, other=0.0)
    rc1 = tl.zeros([L], acc)
    rc2 = tl.zeros([L], acc)
    grad_y = tl.zeros([L], acc)
    if TERMS.focal:
        rc1 = _times(r1, tl.load(at + stride, mask=exists, other=0.0))
        grad_y -= _times(r1, tl.load(at + 3 * stride, mask=exists, other=0.0))
    if TERMS.ldam:
        rc2 = _times(r2, tl.load(at + 2 * stride, mask=exists, other=0.0))
        grad_y -= _times(r2, tl.load(at + 4 * stride, mask=exists, other=0.0))
    if not TERMS.t2:
        rc1 += rc2
    if TILE.flat:  # a program takes K * RT elements of rows that follow each other, where they may begin and end
        i = tl.arange(0, L * TILE.K)
        from_row = i + (first % TILE.C).to(tl.int32)
        local = from_row * (2**20 // TILE.C + 1) >> 20  # from_row // C, exact as long as from_row * C < 2**20
        is_target = from_row - local * TILE.C == tl.gather(y, local, 0)
        m, rc1, rc2 = tl.gather(m, local, 0), tl.gather(rc1, local, 0), tl.gather(rc2, local, 0)
        grad_y = tl.gather(grad_y, local, 0)
        logits += first
        grad_logits += first
        left = rows.to(tl.int64) * TILE.C - first
        if left >= L * TILE.K:
            grad = _gradient(tl.load(logits + i), m, rc1, rc2, is_target, grad_y, s, TERMS)
            tl.store(grad_logits + i, grad)
        else:  # a mask that may end anywhere makes narrow loads and stores
            z = tl.load(logits + i, mask=i < left)
            tl.store(grad_logits + i, _gradient(z, m, rc1, rc2, is_target, grad_y, s, TERMS), mask=i < left)
    else:
        m, rc1, rc2 = m[None, :, None], rc1[None, :, None], rc2[None, :, None]
        y, grad_y = y[None, :, None], grad_y[None, :, None]
        first_class = program % CHUNKS * TILE.chunk
        for step in range(0, TILE.chunk, TILE.K * TILE.LPR * TILE.V):
            classes = first_class + step + _classes(TILE)
            here = (classes < TILE.C) & exists[None, :, None]
            z = _load_tile(logits, offset, first_class + step, TILE.C, stride_c, exists, unit, sizes, TILE)
            grad = _gradient(z, m, rc1, rc2, classes == y, grad_y, s, TERMS)
            tl.store(grad_logits + grad_offset[None, :, None] + classes.to(tl.int64) * grad_c, grad, mask=here)
