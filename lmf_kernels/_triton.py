"""The Triton backend: `forward` and `backward` on GPU tensors, each one launch of a kernel in `_triton_kernels`.

This file finds out where the rows are in memory (`_levels`), picks the shape of the work from a small table (`_tile`:
no tuning at run time) and launches. Plans are cached by shape and strides, so that the second call does a look-up.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton_kernels import Tile, backward_kernel, forward_kernel
from ._triton_math import Terms
from .reference import MEAN, NONE

LANES = 128  # of a tile; a row of many classes takes more
ROW_LANES = 256  # at most, of one row
LANE_CLASSES = 32  # at most, in the registers of a lane
FLAT_ELEMENTS = 1024  # of a tile in backward
FLAT_CLASSES = 64  # at most, of rows that are loaded (and stored) flat
SECTOR = 32  # bytes that memory moves at once


def forward(
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None,
    ldam_weight: Tensor | None,
    focal_weight: Tensor | None,
    ldam_normalizer: Tensor | None,
    focal_normalizer: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    s: float,
    ignore_index: int,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, saved, denominators) in one launch.

    Logits of any strides are read in place if their dimensions other than C collapse into at most three levels, as
    those of a crop of a batch of images do. Others are copied first.
    """
    device = _device(logits.device)
    plan = _forward_plan(logits.shape, logits.stride(), target.stride(), logits.element_size(), device)
    margins, ldam_weight, focal_weight = _dense(margins), _dense(ldam_weight), _dense(focal_weight)
    if plan is None:
        return forward(
            logits.contiguous(), target.contiguous(), margins, ldam_weight, focal_weight, ldam_normalizer,
            focal_normalizer, alpha, beta, gamma, s, ignore_index, reduction,
        )  # fmt: skip
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = torch.empty(target.shape if reduction == NONE else (), dtype=acc, device=logits.device)
    saved = torch.empty((5, plan.rows), dtype=acc, device=logits.device)
    denominators = torch.empty((2 if reduction == MEAN else 0,), dtype=acc, device=logits.device)
    if reduction == NONE and plan.rows == 0:
        return loss, saved, denominators
    with device.made_current():
        partials = counter = None
        if reduction != NONE or plan.tile.chunk < plan.tile.C:
            partials = torch.empty((4 * plan.programs,), dtype=acc, device=logits.device)
            counter = device.counter()
        tensors = (
            logits, target, margins, ldam_weight, focal_weight, ldam_normalizer, focal_normalizer,
            loss, saved, denominators, partials, counter,
        )  # fmt: skip
        scalars = alpha, beta, gamma, s, ignore_index, *plan.arguments
        _launch(forward_kernel, device, plan, tensors, scalars, _terms(alpha, beta, s), reduction)
    return loss, saved, denominators


def backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    denominators: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
    s: float,
    ignore_index: int,
    reduction: int,
    in_place: bool = False,
) -> Tensor:
    """grad_logits in one launch, in the memory layout of logits, or over the logits themselves."""
    grad_logits = logits if in_place else torch.empty_like(logits)
    device = _device(logits.device)
    plan = _backward_plan(
        logits.shape, logits.stride(), grad_logits.stride(), target.stride(),
        grad_output.stride() if grad_output.dim() else None, logits.element_size(), device,
    )  # fmt: skip
    if plan is None:
        grad_output, logits, target = grad_output.contiguous(), logits.contiguous(), target.contiguous()
        return grad_logits.copy_(
            backward(grad_output, logits, target, saved, denominators, alpha, beta, gamma, s, ignore_index, reduction)
        )
    if plan.rows:
        arguments = grad_output, logits, target, saved, denominators, grad_logits
        _launch(backward_kernel, device, plan, arguments, (s, *plan.arguments), _terms(alpha, beta, s), reduction)
    return grad_logits


def _dense(table: Tensor | None) -> Tensor | None:
    return table if table is None or table.is_contiguous() else table.contiguous()


@functools.lru_cache(maxsize=64)
def _terms(alpha: float, beta: float, s: float) -> Terms:
    ldam, focal = alpha != 0, beta != 0
    return Terms(ldam, focal, t1=focal or (ldam and s == 1), t2=ldam and s != 1)


# ---- where rows are -------------------------------------------------------------------------------------------------
class _Levels(NamedTuple):
    """Rows as up to three nested levels: row = (i_0 * middle + i_1) * inner + i_2."""

    rows: int
    depth: int
    middle: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]  # of each tensor


def _levels(sizes: tuple[int, ...], *strides: tuple[int, ...]) -> _Levels | None:
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
    return _Levels(rows, depth, middle, max(inner_size, 1), tuple(zip(step_0, step_1, step_2, strict=True)))


# ---- the shape of the work ------------------------------------------------------------------------------------------
class _Plan(NamedTuple):
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


def _tile(C: int, levels: _Levels, class_strides: tuple[int, ...], itemsize: int, device: "_Device") -> Tile:
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


def _units(levels: _Levels, tile: Tile, sub: int = 1) -> int:
    """How often a tile's rows, `sub` times over, go into all rows."""
    if tile.inner_tiles:
        return levels.rows // levels.inner * _ceil_div(levels.inner, tile.RT)
    return _ceil_div(levels.rows, tile.RT * sub)


def _num_warps(tile: Tile, device: "_Device") -> int:
    """As many as a tile keeps busy."""
    lanes = LANES if tile.flat else tile.RT * tile.LPR * tile.V // tile.align
    return lanes // device.warp_size or 1


@functools.lru_cache(maxsize=1024)
def _forward_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    itemsize: int,
    device: "_Device",
) -> _Plan | None:
    C = shape[1]
    levels = _levels(shape[:1] + shape[2:], strides[:1] + strides[2:], target_strides)
    if levels is None:
        return None
    tile = _tile(C, levels, (strides[1],), itemsize, device)
    rows, step = levels.rows, tile.K * tile.LPR * tile.V
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
    arguments = (rows, levels.middle, levels.inner, *levels.strides[0], strides[1], *levels.strides[1], sub)
    return _Plan(rows, programs, _forward_options(tile, device), tile, arguments, {})


def _forward_options(tile: Tile, device: "_Device") -> dict[str, Any]:
    """Of the compiler, for kernels that sum over classes."""
    # A product fused into the first addition of a reduction is rounded differently from lane to lane.
    options: dict[str, Any] = {"num_warps": _num_warps(tile, device), "enable_fp_fusion": False}
    if tile.flat and tile.K > LANE_CLASSES and device.is_nvidia:
        options["maxnreg"] = 168  # three programs a multiprocessor; left to itself the compiler spills to have four
    return options


@functools.lru_cache(maxsize=1024)
def _backward_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    grad_strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    outer_strides: tuple[int, ...] | None,
    itemsize: int,
    device: "_Device",
) -> _Plan | None:
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
    return _Plan(levels.rows, programs, options, tile, arguments, {})


# ---- launching ------------------------------------------------------------------------------------------------------
class _Device:
    """What launches need to know of a device, and the counters of its forward launches.

    A counter is zero between launches, and launches that may overlap have different ones:
    * eager launches have one for each stream, zeroed on that stream, and launches of one stream do not overlap;
    * a launch under graph capture takes one that is never given to another, since graphs captured on one stream may
      replay at the same time, but replays of one graph do not. These are made by eager calls beforehand: what is
      allocated and zeroed under capture would be zeroed by every replay, at a time when another may be counting.
    """

    SPARE = 1024

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"  # else Triton's interpreter or an emulator
        properties = torch.cuda.get_device_properties(device) if self.on_gpu else None
        self.multiprocessors = properties.multi_processor_count if properties else 132
        self.warp_size = getattr(properties, "warp_size", 32)
        self.is_nvidia = torch.version.hip is None
        self._of_stream: dict[int, Tensor] = {}
        self._spare: list[Tensor] = []

    def made_current(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches on the current device."""
        if not self.on_gpu or self.device.index == torch.cuda.current_device():
            return _NOTHING
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index) if self.on_gpu else 0

    def counter(self) -> Tensor:
        """A zero int32 for one launch on the current stream, aligned as the kernel was compiled for."""
        if self.on_gpu and torch.cuda.is_current_stream_capturing():
            if not self._spare:
                raise RuntimeError("warm up first: call the loss once on this device before CUDA graph capture")
            return self._spare.pop()
        if len(self._spare) < self.SPARE // 2:
            self._spare += torch.zeros((self.SPARE, 4), dtype=torch.int32, device=self.device).unbind()
        stream = self.stream()
        if stream not in self._of_stream:
            self._of_stream[stream] = torch.zeros(4, dtype=torch.int32, device=self.device)
        return self._of_stream[stream]


_NOTHING = contextlib.nullcontext()


@functools.cache
def _device(device: torch.device) -> _Device:
    return _Device(device)


def _check_pointers(tensors: Sequence[Tensor | None]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.numel() and tensor.data_ptr() == 0:
            raise RuntimeError(f"the memory of a tensor of shape {tuple(tensor.shape)} was released")


def _launch(
    kernel: Any,
    device: _Device,
    plan: _Plan,
    tensors: Sequence[Tensor | None],
    scalars: Sequence[float],
    terms: Terms,
    reduction: int,
) -> None:
    """kernel(*tensors, *scalars), by Triton's own launcher at first and then directly by the kernel it compiled.

    Triton compiles for the plan's integers, for dtypes and for pointers divisible by 16; only that case is kept here.
    """
    variant = (terms, reduction, *(None if tensor is None else tensor.dtype for tensor in tensors))
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if 0 in pointers:
        _check_pointers(tensors)
    aligned = all(pointer is None or pointer % 16 == 0 for pointer in pointers)
    compiled = plan.compiled.get(variant) if aligned else None
    if compiled is not None:
        launch = compiled[(plan.programs, 1, 1)]
        launch(*pointers, *scalars, plan.tile, terms, reduction, stream=device.stream())
        return
    try:
        compiled = kernel[(plan.programs,)](*tensors, *scalars, plan.tile, terms, reduction, **plan.options)
    except (RuntimeError, ValueError) as error:
        if device.on_gpu or not ("active drivers" in str(error) or "cpu tensor" in str(error)):
            raise
        raise RuntimeError(
            f'backend="triton" cannot run on {device.device.type} tensors: move them to a GPU, or set '
            f"TRITON_INTERPRET=1 before Triton is imported to run its interpreter (Triton says: {error})"
        ) from error
    if compiled is not None and aligned:  # the interpreter and the emulator return nothing
        plan.compiled[variant] = compiled
