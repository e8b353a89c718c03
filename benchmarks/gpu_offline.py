"""What can be known of the Triton kernels without a GPU: compiled resources, traffic in the emulator, host time.

The kernels of a case are those that a GPU with `MULTIPROCESSORS` would run at the case's full size. The emulator runs
the same kernels at the small size, on a device with one multiprocessor, so that a program has as many rows as there.
"""

import contextlib
import dataclasses
import functools
import math
import re
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from ptxsim.emulate import Launch, emulate
from ptxsim.triton_run import is_tensor, specialise, unwrap

from lmf_kernels import _backends, lmf_loss
from lmf_kernels._call import MEAN, Options, Tables
from lmf_kernels.triton import launch as triton_launch

MULTIPROCESSORS = 132
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Case(NamedTuple):
    regime: str
    full: tuple[int, ...]  # logits, as a GPU would see them
    small: tuple[int, ...]  # for the emulator
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"({', '.join(['N', *map(str, self.full[1:])])})" + (
            f" {self.layout}" if self.layout != "contiguous" else ""
        )


CASES = (
    Case("few", (1 << 20, 2), (2048, 2)),
    Case("few", (1 << 20, 7), (2048, 7)),
    Case("few", (1 << 20, 8), (2048, 8)),
    Case("few", (1 << 20, 50), (1024, 50)),
    Case("few", (1 << 20, 64), (1024, 64)),
    Case("middle", (65536, 100), (512, 100)),
    Case("middle", (16384, 1000), (128, 1000)),
    Case("middle", (16384, 1001), (128, 1001)),
    Case("middle", (4096, 8192), (32, 8192)),
    Case("large", (4096, 32000), (32, 32000)),
    Case("large, split rows", (128, 128256), (2, 128256)),
    Case("dense", (16, 2, 512, 512), (1, 2, 64, 64)),
    Case("dense", (16, 5, 512, 512), (1, 5, 64, 64)),
    Case("dense", (16, 21, 512, 512), (1, 21, 64, 64)),
    Case("dense", (16, 150, 512, 512), (1, 150, 64, 64)),
    Case("few", (16, 21, 512, 512), (1, 21, 32, 32), "channels_last"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and a vector (C,) that serves as margins and both weights."""
    logits = torch.randn(shape).to(dtype)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    return logits, target, torch.rand(shape[1])


@contextlib.contextmanager
def device_of(multiprocessors: int) -> Iterator[None]:
    """CPU tensors count as those of a device with so many multiprocessors."""
    device = triton_launch.Device(torch.device("cpu"))
    device.multiprocessors = multiprocessors
    original = triton_launch.device_of
    triton_launch.device_of = lambda _: device  # type: ignore[assignment]
    try:
        yield
    finally:
        triton_launch.device_of = original


# ---- compiled resources ---------------------------------------------------------------------------------------------
class Kernel(NamedTuple):
    """A launch that was held back."""

    function: Any
    plan: Any
    arguments: tuple[Any, ...]


def padded(kernel: Kernel) -> int:
    """Classes that a row is worked on with, those included that only fill up the tile."""
    tile = kernel.plan.tile
    if tile.flat and kernel.function is triton_launch.backward_kernel:
        return tile.C
    step = tile.K * tile.LPR * tile.V
    return -(-tile.C // step) * step


def kernels(case: Case, dtype: torch.dtype, s: float = 30.0) -> dict[str, Kernel]:
    """The forward and the backward launch at the case's full size, for which no memory is touched."""
    found: list[Kernel] = []

    def hold(kernel, device, plan, tensors, scalars, terms, reduction):  # type: ignore[no-untyped-def]
        found.append(Kernel(kernel, plan, (*tensors, *scalars, plan.tile, terms, reduction)))

    # Untouched memory costs nothing: the operating system hands out its pages at the first write.
    logits = torch.empty(case.full, dtype=dtype)
    if case.layout == "channels_last":
        logits = torch.empty(case.full, dtype=dtype, memory_format=torch.channels_last)
    target = torch.empty((case.full[0], *case.full[2:]), dtype=torch.long)
    table = torch.empty(case.full[1])
    original, triton_launch._launch = triton_launch._launch, hold
    try:
        with device_of(MULTIPROCESSORS):
            options = Options(1.0, 1.0, 1.5, s, -100, MEAN)
            loss, saved, denominators = triton_launch.forward(logits, target, Tables(table, table, table), options)
            triton_launch.backward(loss, logits, target, saved, denominators, options)
    finally:
        triton_launch._launch = original
    return dict(zip(("forward", "backward"), found, strict=True))


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes a thread
    local: int  # bytes a thread: stack and local memory
    shared: int  # bytes a program


def compiled(kernel: Kernel, target: str) -> Any:
    """The kernel compiled as its launch on `target` would, with pointers divisible by 16 (allocations are)."""
    function = unwrap(kernel.function)
    values = dict(zip(function.arg_names, kernel.arguments, strict=True))
    signature, constants, attributes = specialise(function, values, {n: 0 for n, v in values.items() if is_tensor(v)})
    source = triton.compiler.ASTSource(function, signature, constants, attributes)
    num_warps = max(1, kernel.plan.options["num_warps"] * 32 // TARGETS[target].warp_size)
    return triton.compile(source, target=TARGETS[target], options={**kernel.plan.options, "num_warps": num_warps})


def resources(kernel: Kernel, target: str) -> Resources:
    binary = compiled(kernel, target)
    if target == "gfx942":
        assembly = binary.asm["amdgcn"]
        count = {k: int(re.search(rf"\.{k}:\s+(\d+)", assembly)[1]) for k in _AMD_COUNTS}  # type: ignore[index]
        return Resources(
            count["vgpr_count"] + count["agpr_count"],
            4 * count["vgpr_spill_count"],
            count["private_segment_fixed_size"],
            binary.metadata.shared,
        )
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _cuobjdump("--dump-resource-usage", binary))
    assert usage is not None
    spills = re.findall(r"\b(?:STL|LDL)[.\s]", _cuobjdump("-sass", binary))
    return Resources(int(usage[1]), 4 * len(spills), int(usage[2]) + int(usage[3]), binary.metadata.shared)


_AMD_COUNTS = ("vgpr_count", "agpr_count", "vgpr_spill_count", "private_segment_fixed_size")


def _cuobjdump(option: str, binary: Any) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


# ---- traffic and instructions in the emulator ------------------------------------------------------------------------
class Traffic(NamedTuple):
    """Counts of one launch; bytes of logits and gradient are in units of the logits' size."""

    programs: int
    read: float  # logits, requested by threads
    read_sectors: float  # logits, 32-byte sectors touched by requests
    written: float  # gradient
    written_sectors: float
    width: int  # bytes of a thread's load of logits
    row_bytes: float  # all other bytes a row but the gathers of margins and weights
    exponentials: float  # an element
    mufu_a_row: float  # beyond those exponentials: what the row mathematics and the combination of lanes take
    instructions: float  # warp instructions for 32 elements
    shared_wavefronts: float  # a row


TABLES = ("margins", "ldam_weight", "focal_weight")


def traffic(case: Case, dtype: torch.dtype, s: float = 30.0, target: int = 90) -> dict[str, Traffic]:
    logits, labels, table = problem(case.small, dtype, case.layout)
    with device_of(1), emulate(target=target, bank_conflicts=True) as launches:
        options = Options(1.0, 1.0, 1.5, s, -100, MEAN)
        loss, saved, denominators = triton_launch.forward(logits, labels, Tables(table, table, table), options)
        triton_launch.backward(loss, logits, labels, saved, denominators, options)
    assert len(launches) == 2
    return {
        launch.name.removesuffix("_kernel"): _count(launch, logits, labels.numel(), 1 if s == 1 else 2)
        for launch in launches
    }


def _count(launch: Launch, logits: Tensor, rows: int, exponentials: int) -> Traffic:
    memory, instructions = launch.stats.memory, launch.stats.instructions
    size = logits.numel() * logits.element_size()
    z = memory["logits"]
    gradient = memory.get("grad_logits", dict.fromkeys(z, 0))
    others = [counts for name, counts in memory.items() if name not in ("logits", "grad_logits", *TABLES)]
    return Traffic(
        programs=math.prod(launch.grid),
        read=z["ld_bytes"] / size,
        read_sectors=32 * z["ld_sectors"] / size,
        written=gradient["st_bytes"] / size,
        written_sectors=32 * gradient["st_sectors"] / size,
        width=1 << math.ceil(math.log2(z["ld_bytes"] / (32 * z["ld_requests"]))),
        row_bytes=sum(counts["ld_unique"] + counts["st_unique"] for counts in others) / rows,
        exponentials=32 * instructions["ex2"] / logits.numel(),
        mufu_a_row=(32 * instructions["mufu"] - exponentials * logits.numel()) / rows,
        instructions=32 * instructions["total"] / logits.numel(),
        shared_wavefronts=launch.stats.shared_wavefronts / rows,
    )


class Operations(TorchDispatchMode):
    """Names of the operations that would launch a kernel or synchronise."""

    # These do neither; set_ is the emulator's.
    FREE = ("empty", "view", "detach", "select", "as_strided", "unbind", "unsqueeze", "expand", "alias", "set_")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if not any(name.startswith(free) for free in self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Whole(NamedTuple):
    """Forward and backward of a loss, through autograd."""

    moved: float  # bytes of logits and gradient, read and written, over the logits' size
    row_bytes: float  # all others
    bytes: float  # the sum of both
    launches: int  # of Triton kernels
    operations: tuple[str, ...]  # other operations on the device


def whole(loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Whole:
    logits, labels, _ = problem(shape, dtype)
    logits.requires_grad_()
    operations = Operations()
    row = _backends.TABLE["triton"]
    kernels = row.kernels._replace(forward=triton_launch.forward, backward=triton_launch.backward)
    _backends.TABLE["triton"] = dataclasses.replace(row, kernels=kernels)  # not the ops: the mode sees inside
    with device_of(1), emulate(target=90) as launches:
        outer = torch.ones_like(loss(logits.detach(), labels))  # the first call sets up counters
        launches.clear()
        with operations:
            torch.autograd.grad(loss(logits, labels), logits, outer)
    _backends.TABLE["triton"] = row
    size = logits.numel() * logits.element_size()
    big = small = 0
    for launch in launches:
        for name, counts in launch.stats.memory.items():
            if launch.shapes.get(name, ("", ()))[1] == logits.shape:
                big += counts["ld_useful"] + counts["st_useful"]
            elif name not in TABLES:
                small += counts["ld_unique"] + counts["st_unique"]
    return Whole(big / size, small / shape[0], big + small, len(launches), tuple(operations.names))


# ---- host time ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def stub_driver() -> Iterator[list[tuple[Any, ...]]]:
    """Triton's own launch path for sm_90 on CPU tensors, down to the driver's launch call, which is only recorded.

    That call and all else that Triton has in C is replaced: up to Triton 3.6 the launcher compiles a module for each
    kernel's signature, from 3.8 on it takes these names from one that was compiled for all.
    """
    from triton.backends.nvidia import driver as nvidia

    launched: list[tuple[Any, ...]] = []

    class Compiled:
        load_binary = staticmethod(lambda *_: (1, 2, 32, 0, 1024))
        unload_module = staticmethod(lambda *_: None)
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232448})
        build_signature_metadata = staticmethod(lambda signature: signature)
        launch = staticmethod(lambda *arguments: launched.append(arguments))

    class Driver:
        utils = Compiled
        launcher_cls = nvidia.CudaLauncher
        get_current_target = staticmethod(lambda: TARGETS["sm_90"])
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _=None: 0)

    names = {
        "compile_module_from_src": lambda **_: Compiled,
        "library_dirs": list,
        "PyKernelArg": namedtuple("PyKernelArg", "nested_tuple type"),
        "ARG_CONSTEXPR": 0,
        "ARG_KERNEL": 1,
        "ARG_TUPLE": 2,
    }
    # Of the latter the active driver is restored, under whatever names it is kept: to read it would look for a GPU.
    with mock.patch.dict(vars(nvidia), names), mock.patch.dict(vars(triton.runtime.driver)):
        triton.runtime.driver.set_active(Driver())
        try:
            with device_of(MULTIPROCESSORS):
                yield launched
        finally:
            for kernel in (triton_launch.forward_kernel, triton_launch.backward_kernel):
                for cache, *_ in kernel.device_caches.values():
                    for binary in cache.values():
                        binary.module = None  # nothing to unload
                kernel.device_caches.clear()
            triton_launch.forward_plan.cache_clear()
            triton_launch.backward_plan.cache_clear()


def microseconds(run: Callable[[], object], batches: int = 200, calls: int = 40) -> float:
    """Time of a call, the best of many short batches: others use this machine, too."""
    for _ in range(calls):
        run()
    best = math.inf
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e6 * best


def host_times(batches: int = 200) -> dict[str, float]:
    """Microseconds of Python from a call to the driver's launch, with (64, 7) logits, margins and weights."""
    logits, target, table = problem((64, 7), torch.float32)
    leaf = logits.clone().requires_grad_()
    options = Options(1.0, 1.0, 1.5, 30.0, -100, MEAN)
    # Pointers that are not divisible by 16 go by Triton's launcher every time.
    odd = torch.randn(64 * 7 + 1)[1:].view(64, 7)
    timed = functools.partial(microseconds, batches=batches)

    def forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return triton_launch.forward(z, target, Tables(table, table, table), options)

    def step() -> None:
        torch.autograd.grad(lmf_loss(leaf, target, margins=table, weight=table, backend="triton"), leaf)

    with stub_driver():
        loss, saved, denominators = forward(logits)

        def backward(z: Tensor) -> Tensor:
            return triton_launch.backward(loss, z, target, saved, denominators, options)

        return {
            "lmf_loss forward + backward, with autograd": timed(step),
            "forward op": timed(lambda: forward(logits)),
            "backward op": timed(lambda: backward(logits)),
            "forward op by Triton's launcher": timed(lambda: forward(odd)),
            "backward op by Triton's launcher": timed(lambda: backward(odd)),
        }
