"""Launches by this Triton's own CUDA launcher and the stub of libcuda, for tests/test_launcher.py, which starts it.

CPU tensors count as those of an sm_90 GPU. Nothing of Triton is replaced, only what it and the package ask torch.cuda:
the device, its capability and the stream. What a kernel is given is read as the driver would read it: as many
parameters of such sizes as its PTX declares.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import CudaDriver

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gpu_offline import CASES, MULTIPROCESSORS

from lmf_kernels import lmf_loss
from lmf_kernels._call import SUM, Options
from lmf_kernels.triton import launch as triton_launch

FORWARD, BACKWARD, SUMS = triton_launch.forward_kernel, triton_launch.backward_kernel, triton_launch.sums_kernel
FORMAT = {"u64": "<Q", "s64": "<q", "b64": "<q", "u32": "<I", "s32": "<i", "b32": "<i", "f64": "<d", "f32": "<f"}
BYTES = {name: struct.calcsize(text) for name, text in FORMAT.items()}


# ---- what the driver is given ---------------------------------------------------------------------------------------
class Seen(NamedTuple):
    """A launch, as the driver sees it."""

    function: int
    compiled: Any
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    stream: int
    words: list[bytes]


@functools.cache
def declared(ptx: str) -> tuple[list[str], int]:
    """(types of the parameters, threads a program) of the only kernel of a PTX module."""
    (header,) = re.findall(r"\.visible \.entry \w+\((.*?)\)(.*?)\{", ptx, re.DOTALL)
    threads = re.search(r"\.reqntid (\d+)", header[1]) or re.search(r"\.maxntid (\d+)", header[1])
    return re.findall(r"\.param \.(\w+)", header[0]), int(threads[1])


def compiled_kernels() -> dict[int, Any]:
    """By their handle, the address of their image, all that Triton has compiled and loaded."""
    return {
        binary.function: binary
        for kernel in (FORWARD, BACKWARD, SUMS)
        for cache, *_ in kernel.device_caches.values()
        for binary in cache.values()
    }


SEEN: list[Seen] = []


@ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p)
)
def on_launch(function: int, sizes: Any, stream: int, parameters: Any) -> None:
    compiled = compiled_kernels()[function]
    types, _ = declared(compiled.asm["ptx"])
    words = [ctypes.string_at(parameters[i], BYTES[name]) for i, name in enumerate(types)]
    SEEN.append(Seen(function, compiled, tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6], sizes[7], stream, words))


class Stream:
    current = 0x5EED0


def set_up(libcuda: str) -> triton_launch.Device:
    """A device of the package and of Triton, whose driver is the stub."""
    warnings.filterwarnings("ignore", "CUDA initialization")  # autograd asks the stub for more than it has
    ctypes.CDLL(libcuda).stub_on_launch(on_launch)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda _=None: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch._C._cuda_getCurrentRawStream = lambda _: Stream.current
    triton.runtime.driver.set_active(CudaDriver())
    device = triton_launch.Device(torch.device("cpu", 0))
    device.on_gpu, device.multiprocessors = True, MULTIPROCESSORS
    triton_launch.device_of = lambda _: device
    return device


# ---- what the package asked for -------------------------------------------------------------------------------------
class Asked(NamedTuple):
    """A call of `_launch`, and how often it went by Triton's launcher."""

    kernel: Any
    plan: Any
    values: dict[str, Any]  # by the names of the kernel's arguments
    by_triton: int


ASKED: list[Asked] = []


class Counted:
    """A kernel that counts its launches by Triton's launcher."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.count += 1
        return self.kernel[grid]


def spy(original: Any) -> Any:
    def launch(kernel, device, plan, tensors, scalars, terms, reduction):  # type: ignore[no-untyped-def]
        counted = Counted(kernel)
        original(counted, device, plan, tensors, scalars, terms, reduction)
        arguments = (*tensors, *scalars, plan.tile, terms, reduction)
        values = dict(zip(kernel.arg_names, arguments, strict=True))
        ASKED.append(Asked(kernel, plan, values, counted.count))

    return launch


# ---- one against the other ------------------------------------------------------------------------------------------
def check(asked: Asked, seen: Seen, known: dict[str, Any]) -> dict[str, Any]:
    """Every word of a launch is the value of its argument, where `known` says what that is; returns the values."""
    values = asked.values | known
    assert values.keys() == asked.values.keys(), f"unknown names in {known.keys()}"
    source, where = seen.compiled.src, asked.kernel.__name__
    types, threads = declared(seen.compiled.asm["ptx"])
    read, word = {}, iter(zip(types, seen.words, strict=True))
    for i, name in enumerate(asked.kernel.arg_names):
        value = values[name]
        if source.signature[name] == "constexpr":
            read[name] = source.constants[i,]
            assert read[name] == value, f"{where}: {name} was compiled in as {read[name]}, not {value}"
            continue
        kind, data = next(word)
        if isinstance(value, Tensor):
            value = value.data_ptr()
        # Integers in PTX have no sign: what counts are the bits.
        signed = FORMAT[kind] if kind[0] == "f" else FORMAT[kind].lower()
        (read[name],) = struct.unpack(signed, data)
        assert data == struct.pack(signed, value), f"{where}: {name} is {read[name]}, not {value}"
        if [["tt.divisibility", 16]] == source.attrs.get((i,)):
            assert read[name] % 16 == 0, f"{where}: {name} is {read[name]}, compiled as a multiple of 16"
    scratch = [data for _, data in word]
    assert scratch and not any(map(any, scratch)), f"{where}: scratch memory {scratch}"
    image = seen.compiled.asm["cubin"]
    assert ctypes.string_at(seen.function, len(image)) == image
    assert seen.grid == (asked.plan.programs, 1, 1), f"{where}: grid {seen.grid}, not {asked.plan.programs}"
    assert seen.block == (threads, 1, 1), f"{where}: block {seen.block}, compiled for {threads}"
    assert seen.shared == seen.compiled.metadata.shared, f"{where}: {seen.shared} bytes of shared memory"
    assert seen.stream == Stream.current, f"{where}: stream {seen.stream:#x}, not {Stream.current:#x}"
    assert seen.attributes == 0
    return read


def check_rows(read: dict[str, Any], names: tuple[str, str, str], tensor: Tensor, class_dim: bool) -> None:
    """The words lead to the memory of each row; the formula is that of `_offset` in the kernels."""
    sizes = tuple(tensor.shape[:1] + tensor.shape[2:] if class_dim else tensor.shape)
    strides = tensor.stride()[:1] + tensor.stride()[2:] if class_dim else tensor.stride()
    rows, middle, inner = read["rows"], read["middle"], read["inner"]
    s0, s1, s2 = (read[name] for name in names)
    row = torch.cat([torch.arange(min(rows, 1000)), torch.randint(0, rows, (1000,)), torch.tensor([rows - 1])])
    outer, i_2 = row // inner, row % inner
    levels = read["TILE"].levels
    offset = row * s2 if levels == 1 else outer * s1 + i_2 * s2
    if levels == 3:
        offset = outer // middle * s0 + outer % middle * s1 + i_2 * s2
    exact, left = torch.zeros_like(row), row
    for size, step in zip(reversed(sizes), reversed(strides), strict=True):
        exact, left = exact + left % size * step, left // size
    assert torch.equal(offset, exact), f"rows of shape {sizes}, strides {strides}: levels {levels}, {s0, s1, s2}"


# ---- calls ----------------------------------------------------------------------------------------------------------
class Variant(NamedTuple):
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    reduction: str
    tables: bool  # margins and weights
    normalizer: bool  # of tensors
    sums: bool  # those of a slice of classes, too
    misaligned: bool  # and in memory that is not divisible by 16, too


def memory(shape: tuple[int, ...], layout: str, dtype: torch.dtype, offset: int) -> Tensor:
    """Untouched memory, so that it costs nothing; begins `offset` elements behind an address divisible by 64."""
    rows, C, *inner = shape
    if layout == "channels_last":
        strides = torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride()
    elif layout == "padded":
        strides = (C + 8, 1)
    elif layout == "transposed":
        strides = (1, rows)
    elif layout == "far":  # a stride of more than 32 bits
        strides = (2**31 + 64, 4096, 64, 1)
    elif layout == "crop":
        height, width = inner
        strides = (C * (height + 3) * (width + 16), (height + 3) * (width + 16), width + 16, 1)
    else:
        strides = torch.empty(shape, device="meta").stride()
    span = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    return torch.empty(span + offset, dtype=dtype).as_strided(shape, strides, offset)


def vectors(variant: Variant) -> dict[str, Tensor | None]:
    C = variant.shape[1]
    tables = {name: torch.empty(C) if variant.tables else None for name in ("margins", "ldam_weight", "focal_weight")}
    tables |= {"ldam_normalizer": None, "focal_normalizer": None}
    if variant.normalizer:
        tables |= {"ldam_normalizer": torch.tensor(3.0), "focal_normalizer": torch.tensor(5.0, dtype=torch.float64)}
    return tables


KEPT: list[Any] = []  # memory of earlier calls, so that a later one has other addresses


def call(variant: Variant, number: int, direct: bool, offset: int = 0) -> list[int]:
    """Loss and gradient on new memory, with options of their own; all launches are checked. Returns their functions."""
    KEPT.extend(ASKED)
    ASKED.clear()
    SEEN.clear()
    logits = memory(variant.shape, variant.layout, variant.dtype, offset).requires_grad_()
    target = torch.zeros((variant.shape[0], *variant.shape[2:]), dtype=torch.long)
    if variant.layout == "padded":
        target = torch.zeros((variant.shape[0], 3), dtype=torch.long)[:, 0]
    tables = vectors(variant)
    options = {"alpha": 1.25 + number, "beta": 0.75 / (1 + number), "gamma": 1.5 + number, "s": 30.0 - number}
    ignore_index = -100 - (number << 40)
    given = {name: value for name, value in tables.items() if not name.endswith("normalizer")}
    if variant.normalizer:
        given["normalizer"] = tables["ldam_normalizer"], tables["focal_normalizer"]
    loss = lmf_loss(
        logits, target, ignore_index=ignore_index, reduction=variant.reduction, backend="triton", **options, **given
    )
    outer = torch.empty_like(loss)
    if offset:
        outer = torch.ones((), dtype=loss.dtype).expand(loss.shape)
    (grad,) = torch.autograd.grad(loss, logits, outer)

    (forward, backward), (forward_seen, backward_seen) = ASKED, SEEN
    assert (forward.kernel, backward.kernel) == (FORWARD, BACKWARD)
    rows, accumulated = target.numel(), torch.float64 if variant.dtype == torch.float64 else torch.float32
    C, stride_c = logits.shape[1], logits.stride(1)
    saved, denominators = forward.values["saved"], forward.values["denominators"]
    assert saved.shape == (5, rows) and saved.dtype == loss.dtype == accumulated
    assert denominators.shape == ((2,) if variant.reduction == "mean" else (0,)) and denominators.dtype == accumulated
    partials, counter = forward.values["partials"], forward.values["counter"]
    if variant.reduction != "none" or forward.plan.tile.chunk < C:
        assert partials.shape == (4 * forward.plan.programs,) and partials.dtype == accumulated
        assert counter.dtype == torch.int32 and counter[0] == 0
        assert counter is triton_launch.device_of(None)._of_stream[Stream.current]
    else:
        assert partials is counter is None
    same = {"logits": logits, "target": target, "rows": rows, "stride_c": stride_c}
    known = same | tables | options | {"loss": loss, "ignore_index": ignore_index}
    read = check(forward, forward_seen, known)
    check_rows(read, ("stride_0", "stride_1", "stride_2"), logits, True)
    check_rows(read, ("target_0", "target_1", "target_2"), target, False)

    known = same | {"saved": saved, "denominators": denominators, "s": options["s"]}
    known |= {"grad_logits": grad, "grad_c": grad.stride(1)} | ({"grad_output": outer} if rows else {})
    read = check(backward, backward_seen, known)
    check_rows(read, ("stride_0", "stride_1", "stride_2"), logits, True)
    check_rows(read, ("grad_0", "grad_1", "grad_2"), grad, True)
    check_rows(read, ("target_0", "target_1", "target_2"), target, False)
    if variant.reduction == "none":
        check_rows(read, ("outer_0", "outer_1", "outer_2"), outer, False)

    if variant.sums:
        with torch.no_grad():
            found = triton_launch.sums(logits, target, 3, Options(1.25, 0.75, 1.5, options["s"], ignore_index, SUM))
        known = same | {"sums": found, "s": options["s"], "first_class": 3, "ignore_index": ignore_index}
        read = check(ASKED[2], SEEN[2], known)
        check_rows(read, ("stride_0", "stride_1", "stride_2"), logits, True)
        check_rows(read, ("target_0", "target_1", "target_2"), target, False)
    assert len(ASKED) == len(SEEN) == 2 + variant.sums
    assert [asked.by_triton for asked in ASKED] == [0 if direct else 1] * len(ASKED), "not launched the expected way"
    return [seen.function for seen in SEEN]


def launches(variant: Variant) -> int:
    """Each loss by Triton's launcher at first, then directly, on this and another stream."""
    KEPT.clear()
    Stream.current = 0x5EED0
    functions = [call(variant, 0, direct=False), call(variant, 1, direct=True)]
    Stream.current = 0x7F00_1234_5678
    functions.append(call(variant, 2, direct=True))
    if variant.misaligned:  # by Triton's launcher every time, and what is kept for aligned memory stays right
        odd = [call(variant, number, direct=False, offset=1) for number in (3, 4)]
        functions.append(call(variant, 5, direct=True))
        assert odd[0] == odd[1] and not set(odd[0]) & set(functions[0]), "aligned and other memory have one kernel"
    else:
        odd = []
    assert all(each == functions[0] for each in functions), "the direct launch took another kernel than Triton"
    return sum(map(len, functions + odd))


SHAPES = [(case.full, case.layout) for case in CASES] + [
    ((4096, 1000), "padded"),
    ((65536, 12), "transposed"),
    ((4, 21, 64, 160), "crop"),
    ((1, 9), "contiguous"),
    ((300, 64), "padded"),
    ((64, 40000), "contiguous"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("none", "mean", "sum")


def variant(i: int, shape: tuple[int, ...], layout: str, dtype: torch.dtype, reduction: str) -> Variant:
    normalizer = reduction == "mean" and i % 2 == 0
    return Variant(shape, layout, dtype, reduction, i % 5 != 1, normalizer, i % 5 == 0, i % 5 in (0, 3))


def sample() -> list[Variant]:
    one_of_each = [variant(i, *shape, DTYPES[i % 4], REDUCTIONS[i % 3]) for i, shape in enumerate(SHAPES)]
    # Another kernel of the plan of one_of_each[1].
    return [*one_of_each, Variant(*SHAPES[1], torch.float16, "mean", True, True, False, False)]


def everything() -> list[Variant]:
    combinations = [(dtype, reduction) for dtype in DTYPES for reduction in REDUCTIONS]
    found = [variant(i, *shape, *combination) for shape in SHAPES for i, combination in enumerate(combinations)]
    return [*found, variant(0, (2, 5, 64, 64), "far", torch.float16, "mean")]


if __name__ == "__main__":
    libcuda, amount = sys.argv[1:]
    set_up(libcuda)
    triton_launch._launch = spy(triton_launch._launch)
    total = 0
    for each in sample() if amount == "sample" else everything():
        try:
            total += launches(each)
        except BaseException:
            print(each, file=sys.stderr)
            raise
    kernels = len(compiled_kernels())
    print(f"Triton {triton.__version__}: {total} launches of {kernels} kernels, every argument word right")
