"""What the CUDA C++ kernels cost without a GPU: compiled resources, and traffic in the emulator.

    python benchmarks/cuda_report.py [--quick]

Prints the tables of docs/cuda.md, over the cases of the Triton kernels (gpu_report.py): the kernels that a GPU with
MULTIPROCESSORS would run at the full size, and the counts of the small size on a device with one multiprocessor.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from gpu_offline import CASES, MULTIPROCESSORS, TABLES, Case, problem

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from cuda_emulator import Emulator, Launch, entry
from cuda_resources import resources

from lmf_kernels import _ops

ODD_IMAGES = (  # a pixel count that is no multiple of 16 bytes, nor of two elements
    Case("dense", (16, 21, 513, 511), (1, 21, 65, 63)),
)
# What statistics are taken of: many classes, or pixels.
SLICES = tuple(case for case in CASES if case.full[1] >= 1000 or case.full[1:] == (21, 512, 512))
OPTIONS = (1.0, 1.0, 1.5, 30.0, -100, 1)
SLICE_OPTIONS = (0, *OPTIONS)


def run(emulator: Emulator, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Launch, Launch]:
    """Forward and backward of 'mean', with margins and both weights."""
    logits, target, table = problem(shape, dtype, layout)
    loss, saved, denominators = emulator.forward(logits, target, table, table, table, None, None, *OPTIONS)
    emulator.backward(loss, logits, target, saved, denominators, *OPTIONS)
    forward, backward = emulator.launches
    return forward, backward


def kernels(case: Case, dtype: torch.dtype) -> list[tuple[str, int]]:
    """Names and grids of forward, backward and statistics at full size; no memory is touched."""
    found: list[tuple[str, int]] = []

    def hold(kernel: str, grid: list[int], *_: object) -> None:
        found.append((kernel, grid[0]))

    form = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    logits = torch.empty(case.full, dtype=dtype, memory_format=form)
    target = torch.empty((case.full[0], *case.full[2:]), dtype=torch.int64)
    loss, saved, denominators = _ops._C.trace_cuda_forward(hold, MULTIPROCESSORS, logits, target, *[None] * 5, *OPTIONS)
    _ops._C.trace_cuda_backward(hold, MULTIPROCESSORS, loss, logits, target, saved, denominators, *OPTIONS)
    _ops._C.trace_cuda_sums(hold, MULTIPROCESSORS, logits, target, *SLICE_OPTIONS)
    return found


def title(kernel: str) -> str:
    function, _, width, _ = kernel.split()
    return function.split("_")[1] + (f", {width} a thread" if function.endswith("pixels") else "")


def architectures() -> list[str]:
    return sorted({arch for arch, _ in resources()}, key=int)


def registers(kernel: str, arch: str) -> str:
    ((count, stack, local),) = (
        used for (on, what), used in resources().items() if on == arch and entry(kernel) in what
    )
    return f"{count}" + (f", {stack + local} B local" if stack or local else "")


def access(launch: Launch) -> str:
    """The usual width of a thread's load."""
    read = launch.stats.memory["logits"]
    return f"{1 << math.ceil(math.log2(read['ld_bytes'] / read['ld_requests'] / 32))} B"


def other_bytes(launch: Launch) -> int:
    """Different bytes beside logits, gradient and tables."""
    return sum(
        counts["ld_unique"] + counts["st_unique"]
        for what, counts in launch.stats.memory.items()
        if what not in ("logits", "grad_logits", *TABLES)
    )


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_table(*rows: list[str]) -> None:
    header, *body = rows
    for row in (header, ["---"] * len(header), *body):
        print("| " + " | ".join(row) + " |")


def resource_rows(cases: tuple[Case, ...], dtypes: tuple[torch.dtype, ...]) -> list[list[str]]:
    """Registers a thread, forward / backward; stack and local bytes only where there are any."""
    rows = [["logits", "dtype", "kernel", "blocks", *(f"sm_{arch}" for arch in architectures())]]
    for case in cases:
        for dtype in dtypes:
            (ahead, blocks), (back, blocks_back), _ = kernels(case, dtype)
            used = (f"{registers(ahead, arch)} / {registers(back, arch)}" for arch in architectures())
            rows.append([str(case), name(dtype), title(ahead), f"{blocks} / {blocks_back}", *used])
    return rows


def slice_rows(cases: tuple[Case, ...], dtypes: tuple[torch.dtype, ...]) -> list[list[str]]:
    """The statistics kernels: registers at full size, counts at the small one."""
    on = (f"sm_{arch}" for arch in architectures())
    rows = [["logits", "dtype", "kernel", "blocks", *on, "read", "sectors", "load", "other B a row", "ex2 an element"]]
    for case in cases:
        for dtype in dtypes:
            *_, (kernel, blocks) = kernels(case, dtype)
            logits, target, _ = problem(case.small, dtype, case.layout)
            emulator = Emulator(multiprocessors=1, options={})
            emulator.sums(logits, target, *SLICE_OPTIONS)
            (launch,) = emulator.launches
            read, size = launch.stats.memory["logits"], logits.numel() * dtype.itemsize
            rows.append([
                str(case), name(dtype), title(kernel), str(blocks),
                *(registers(kernel, arch) for arch in architectures()), f"{read['ld_bytes'] / size:.3f}",
                f"{32 * read['ld_sectors'] / size:.2f}", access(launch), f"{other_bytes(launch) / target.numel():.1f}",
                f"{32 * launch.stats.instructions['ex2'] / logits.numel():.2f}",
            ])  # fmt: skip
    return rows


def traffic_rows(cases: tuple[Case, ...], dtype: torch.dtype) -> list[list[str]]:
    rows = [
        ["logits", "small", "kernel", "read / read + written", "sectors", "load", "other B a row",
         "ex2 an element"],
    ]  # fmt: skip
    for case in cases:
        launches = run(Emulator(multiprocessors=1, options={}), case.small, dtype, case.layout)
        elements = torch.Size(case.small).numel()
        size, n = elements * dtype.itemsize, elements // case.small[1]
        read = [launch.stats.memory["logits"] for launch in launches]
        written = launches[1].stats.memory["grad_logits"]
        rows.append([
            str(case), str(case.small), launches[0].kernel.split()[0].split("_")[1],
            "{:.3f} / {:.3f} + {:.3f}".format(*(x / size for x in (
                read[0]["ld_bytes"], read[1]["ld_bytes"], written["st_bytes"]))),
            "{:.2f} / {:.2f} + {:.2f}".format(*(32 * x / size for x in (
                read[0]["ld_sectors"], read[1]["ld_sectors"], written["st_sectors"]))),
            " / ".join(map(access, launches)),
            " / ".join(f"{other_bytes(launch) / n:.1f}" for launch in launches),
            " / ".join(f"{32 * launch.stats.instructions['ex2'] / elements:.2f}" for launch in launches),
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases")
    quick = parser.parse_args().quick
    cases, slices = (CASES[1:3], SLICES[:1]) if quick else (CASES + ODD_IMAGES, SLICES)
    print("Registers a thread, forward / backward; stack and local memory only where there is any\n")
    print_table(*resource_rows(cases, (torch.float32, torch.bfloat16)))
    print(
        "\nCounts in the emulator (sm_90, bfloat16), forward / backward; requested by threads, over the logits' size\n"
    )
    print_table(*traffic_rows(cases, torch.bfloat16))
    print("\nStatistics of slices: registers, and counts in the emulator (sm_90)\n")
    print_table(*slice_rows(slices, (torch.float32, torch.bfloat16)))
    print(f"\nLibrary: {Path(_ops._C.__file__).stat().st_size / 1e6:.1f} MB for {_ops._C.cuda_architectures()}")


if __name__ == "__main__":
    main()
