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
OPTIONS = (1.0, 1.0, 1.5, 30.0, -100, 1)


def run(emulator: Emulator, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Launch, Launch]:
    """Forward and backward of 'mean', with margins and both weights."""
    logits, target, table = problem(shape, dtype, layout)
    loss, stats, denominators = emulator.forward(logits, target, table, table, table, None, None, *OPTIONS)
    emulator.backward(loss, logits, target, stats, denominators, 1.0, 1.0, 30.0)
    forward, backward = emulator.launches
    return forward, backward


def kernels(case: Case, dtype: torch.dtype) -> list[tuple[str, int]]:
    """Names and grids of the launches at full size; no memory is touched."""
    found: list[tuple[str, int]] = []

    def hold(kernel: str, grid: list[int], *_: object) -> None:
        found.append((kernel, grid[0]))

    form = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    logits = torch.empty(case.full, dtype=dtype, memory_format=form)
    target = torch.empty((case.full[0], *case.full[2:]), dtype=torch.int64)
    loss, stats, denominators = _ops._C.trace_cuda_forward(hold, MULTIPROCESSORS, logits, target, *[None] * 5, *OPTIONS)
    _ops._C.trace_cuda_backward(hold, MULTIPROCESSORS, loss, logits, target, stats, denominators, 1.0, 1.0, 30.0)
    return found


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_table(*rows: list[str]) -> None:
    header, *body = rows
    for row in (header, ["---"] * len(header), *body):
        print("| " + " | ".join(row) + " |")


def resource_rows(cases: tuple[Case, ...], dtypes: tuple[torch.dtype, ...]) -> list[list[str]]:
    """Registers a thread, forward / backward; stack and local bytes only where there are any."""
    table = resources()
    architectures = sorted({arch for arch, _ in table}, key=int)

    def cell(kernel: str, arch: str) -> str:
        ((registers, stack, local),) = (
            used for (on, what), used in table.items() if on == arch and entry(kernel) in what
        )
        return f"{registers}" + (f", {stack + local} B local" if stack or local else "")

    rows = [["logits", "dtype", "kernel", "blocks", *(f"sm_{arch}" for arch in architectures)]]
    for case in cases:
        for dtype in dtypes:
            (ahead, blocks), (back, blocks_back) = kernels(case, dtype)
            function, _, width, _ = ahead.split()
            kernel = function.split("_")[1] + (f", {width} a thread" if function.endswith("pixels") else "")
            used = (f"{cell(ahead, arch)} / {cell(back, arch)}" for arch in architectures)
            rows.append([str(case), name(dtype), kernel, f"{blocks} / {blocks_back}", *used])
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
        others = [
            sum(
                counts["ld_unique"] + counts["st_unique"]
                for what, counts in launch.stats.memory.items()
                if what not in ("logits", "grad_logits", *TABLES)
            )
            for launch in launches
        ]
        rows.append([
            str(case), str(case.small), launches[0].kernel.split()[0].split("_")[1],
            "{:.3f} / {:.3f} + {:.3f}".format(*(x / size for x in (
                read[0]["ld_bytes"], read[1]["ld_bytes"], written["st_bytes"]))),
            "{:.2f} / {:.2f} + {:.2f}".format(*(32 * x / size for x in (
                read[0]["ld_sectors"], read[1]["ld_sectors"], written["st_sectors"]))),
            " / ".join(f"{1 << math.ceil(math.log2(one['ld_bytes'] / one['ld_requests'] / 32))} B" for one in read),
            " / ".join(f"{one / n:.1f}" for one in others),
            " / ".join(f"{32 * launch.stats.instructions['ex2'] / elements:.2f}" for launch in launches),
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases")
    cases = CASES[1:3] if parser.parse_args().quick else CASES + ODD_IMAGES
    print("Registers a thread, forward / backward; stack and local memory only where there is any\n")
    print_table(*resource_rows(cases, (torch.float32, torch.bfloat16)))
    print(
        "\nCounts in the emulator (sm_90, bfloat16), forward / backward; requested by threads, over the logits' size\n"
    )
    print_table(*traffic_rows(cases, torch.bfloat16))
    print(f"\nLibrary: {Path(_ops._C.__file__).stat().st_size / 1e6:.1f} MB for {_ops._C.cuda_architectures()}")


if __name__ == "__main__":
    main()
