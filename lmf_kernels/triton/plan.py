"""Where rows are in memory (`_levels`), and the shape of the work from a small table (`_tile`).

No tuning at run time. Plans are cached by shape and strides, so that the second call does a look-up.
"""

import functools
from typing import Any, NamedTuple

from .device import Device
from .kernels import Tile

LANES = 128  # of a tile; a row of many classes takes more
ROW_LANES = 256  # at most, of one row
LANE_CLASSES = 32  # at most, in the registers of a lane
FLAT_ELEMENTS = 1024  # of a tile in backward
FLAT_CLASSES = 64  # at most, of rows that are loaded (and stored) flat
SECTOR = 32  # bytes that memory moves at once


# ---- where rows are -------------------------------------------------------------------------------------------------
class Levels(NamedTuple):
    """Rows as up to three nested levels: row = (i_0 * middle + i_1) * inner + i_2."""

    rows: int
    depth: int
    middle: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]  # of each tensor


def _levels(sizes: tuple[int, ...], *strides: tuple[int, ...]) -> Levels | None:
    """Merges dimensions that lie behind one another in every tensor; None if more than three are left.

    The first one, the batch, counts even if it is 1, so that a batch of one runs the same kernel.
    """
    rows, merged = sizes[0], [(sizes[0], tuple(steps[0] for steps in strides))]
    for size, *inner in zip(sizes[1:], *(steps[1:] for steps in strides), strict=True):
        rows *= size
        if size == 1:
            continue
        outer_size, outer = merged[-1]
        if all(step == size * inner_step for step, inner_step in zip(outer, inner, strict=True)):
            merged[-1] = (outer_size * size, tuple(inner))
        else:
            merged.append((size, tuple(inner)))
    depth = len(merged)
    if depth > 3:
        return None
    (_, step_0), (middle, step_1), (inner_size, step_2) = [(1, (0,) * len(strides))] * (3 - depth) + merged
    return Levels(rows, depth, middle, max(inner_size, 1), tuple(zip(step_0, step_1, step_2, strict=True)))


# ---- the shape of the work ------------------------------------------------------------------------------------------
class Plan(NamedTuple):
    rows: int
    programs: int
    options: dict[str, Any]  # of the compiler
    tile: Tile
    arguments: tuple[int, ...]  # sizes and strides, as the kernel takes them
    compiled: dict[tuple[Any, ...], Any]  # kernels by what else they depend on


def _power_of_2(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def _ceil_div(n: int, d: int) -> int:
    return -(-n // d)


def _common(width: int, *numbers: int) -> int:
    """The largest power of two up to `width` that divides all numbers."""
    bits = width
    for number in numbers:
        bits |= number
    return bits & -bits


def _tile(C: int, levels: Levels, class_strides: tuple[int, ...], itemsize: int, device: Device) -> Tile:
    """The table. class_strides are those of logits and, in backward, of their gradient."""
    forward = len(class_strides) == 1
    strides = levels.strides[: len(class_strides)]
    wide = 16 // itemsize  # elements of a 128-bit load
    outer_strides = [step for steps in strides for step in steps[:2]]
    inner_strides = [steps[2] for steps in strides]

    if C > 1 and inner_strides[0] < class_strides[0]:
        # Lanes are neighbouring rows, classes are walked a few at a time.
        align = _common(wide, levels.inner, *outer_strides, *class_strides) if set(inner_strides) == {1} else 1
        # In forward a thread also finishes its rows, which takes more registers the more they are.
        K = _power_of_2(C) if C <= 8 else (16 if forward and align > 4 else 32) // align
        lanes = LANES if levels.rows >= 4 * LANES * align * device.multiprocessors else 32
        RT = min(lanes * align, max(32, _power_of_2(levels.inner)))
        inner_tiles = levels.depth > 1 and levels.inner >= 32
        if levels.depth > 1 and not inner_tiles:
            align, RT = 1, LANES
        return Tile(C, K, 1, 1, RT, _ceil_div(C, K) * K, levels.depth, inner_tiles, False, align)

    contiguous_rows = levels.depth == 1 and set(class_strides) == {1} and set(inner_strides) == {C}
    align = _common(wide, C, *outer_strides, *inner_strides) if set(class_strides) == {1} else 1
    if contiguous_rows and C * itemsize % SECTOR and align < C <= FLAT_CLASSES:
        if forward:
            K = _power_of_2(C)
            return Tile(C, K, 1, 1, LANES, K, 1, False, True, 1)
        RT = _power_of_2(FLAT_ELEMENTS // C + 2)  # rows that its elements may belong to
        return Tile(C, FLAT_ELEMENTS // RT, 1, 1, RT, _power_of_2(C), 1, False, True, 1)
    if align == C:
        return Tile(C, 1, 1, C, LANES, C, levels.depth, False, False, C)
    # As many lanes a row as leave a few classes for each, but enough for a sector of memory.
    lanes = max(_ceil_div(C, LANE_CLASSES), min(32, _ceil_div(C, LANE_CLASSES // 2)))
    LPR = min(ROW_LANES, max(_power_of_2(lanes), min(8, 32 // (align * itemsize))))
    K = min(LANE_CLASSES // align, _power_of_2(_ceil_div(C, LPR * align)))
    step = K * LPR * align
    return Tile(C, K, LPR, align, max(1, LANES // LPR), _ceil_div(C, step) * step, levels.depth, False, False, align)


def _units(levels: Levels, tile: Tile, sub: int = 1) -> int:
    """How often a tile's rows, `sub` times over, go into all rows."""
    if tile.inner_tiles:
        return levels.rows // levels.inner * _ceil_div(levels.inner, tile.RT)
    return _ceil_div(levels.rows, tile.RT * sub)


def _num_warps(tile: Tile, device: Device) -> int:
    """As many as a tile keeps busy."""
    lanes = LANES if tile.flat else tile.RT * tile.LPR * tile.V // tile.align
    return lanes // device.warp_size or 1


def _walk(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    itemsize: int,
    device: Device,
) -> tuple[Levels, Tile, tuple[int, ...]] | None:
    """Rows, tile, and the kernel's sizes and strides, of kernels that read logits and labels and sum over classes."""
    levels = _levels(shape[:1] + shape[2:], strides[:1] + strides[2:], target_strides)
    if levels is None:
        return None
    tile = _tile(shape[1], levels, (strides[1],), itemsize, device)
    logits, target = levels.strides
    return levels, tile, (levels.rows, levels.middle, levels.inner, *logits, strides[1], *target)


@functools.lru_cache(maxsize=1024)
def forward_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    itemsize: int,
    device: Device,
) -> Plan | None:
    work = _walk(shape, strides, target_strides, itemsize, device)
    if work is None:
        return None
    levels, tile, arguments = work
    C, rows, step = tile.C, levels.rows, tile.K * tile.LPR * tile.V
    sub = 1
    if tile.RT == 1 and step < C and 0 < rows <= 2 * device.multiprocessors:
        # Too few rows to fill the machine: each is split. Powers of two, so that few kernels serve all numbers of rows.
        steps = _power_of_2(_ceil_div(rows * _ceil_div(C, step), 4 * device.multiprocessors))
        tile = tile._replace(chunk=steps * step)
        programs = rows * _ceil_div(C, tile.chunk)
    else:
        if tile.LPR > 1:  # a unit finishes several tiles at once, as long as there are units enough
            most, units = (tile.LPR, 3) if tile.LPR <= 32 else (8, 8)
            fitting = rows // (tile.RT * units * device.multiprocessors)
            sub = min(most, _power_of_2(fitting + 1) // 2) if fitting else 1
        # More programs than run at once, or with less than 16 rows each, only cost partial sums.
        most = min(16 * device.multiprocessors, max(2 * device.multiprocessors, rows // 16))
        programs = max(1, min(_units(levels, tile, sub), most))
    return Plan(rows, programs, _forward_options(tile, device), tile, (*arguments, sub), {})


def _forward_options(tile: Tile, device: Device) -> dict[str, Any]:
    """Of the compiler, for kernels that sum over classes."""
    # A product fused into the first addition of a reduction is rounded differently from lane to lane.
    options: dict[str, Any] = {"num_warps": _num_warps(tile, device), "enable_fp_fusion": False}
    if tile.flat and tile.K > LANE_CLASSES and device.is_nvidia:
        options["maxnreg"] = 168  # three programs a multiprocessor; left to itself the compiler spills to have four
    return options


@functools.lru_cache(maxsize=1024)
def backward_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    grad_strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    outer_strides: tuple[int, ...] | None,
    itemsize: int,
    device: Device,
) -> Plan | None:
    C = shape[1]
    levels = _levels(
        shape[:1] + shape[2:], strides[:1] + strides[2:], grad_strides[:1] + grad_strides[2:], target_strides,
        target_strides if outer_strides is None else outer_strides,
    )  # fmt: skip
    if levels is None:
        return None
    tile = _tile(C, levels, (strides[1], grad_strides[1]), itemsize, device)
    if tile.LPR > 1:
        tile = tile._replace(chunk=tile.K * tile.LPR * tile.V)
    if tile.flat:
        programs = _ceil_div(levels.rows * C, FLAT_ELEMENTS)
    else:
        programs = _units(levels, tile) * _ceil_div(C, tile.chunk)
    logits, grad, target, outer = levels.strides
    arguments = (levels.rows, levels.middle, levels.inner, *logits, strides[1], *grad, grad_strides[1], *target, *outer)
    # Fusion is asked for by name: Triton's default is on up to 3.9 and off after it.
    options = {"num_warps": _num_warps(tile, device), "enable_fp_fusion": True}
    return Plan(levels.rows, programs, options, tile, arguments, {})


@functools.lru_cache(maxsize=1024)
def sums_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    itemsize: int,
    device: Device,
) -> Plan | None:
    work = _walk(shape, strides, target_strides, itemsize, device)
    if work is None:
        return None
    levels, tile, arguments = work
    return Plan(levels.rows, _units(levels, tile), _forward_options(tile, device), tile, arguments, {})
