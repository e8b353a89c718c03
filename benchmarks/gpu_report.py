"""What the Triton kernels cost: compiled resources, emulated traffic and host time, and on a GPU measured times.

    python benchmarks/gpu_report.py [--out results/gpu] [--quick]

The first three need no GPU (see gpu_offline.py); their tables are those of docs/gpu.md. Where a GPU is found, forward +
backward are timed against a device copy of the same run, next to F.cross_entropy, the eager LMF loss, torch.compile of
it and Liger's cross-entropy (if installed), and saved as gpu_times.csv and gpu_times.png.
"""

import argparse
import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from gpu_offline import (
    CASES,
    DTYPES,
    TARGETS,
    Case,
    Resources,
    Traffic,
    Whole,
    host_times,
    kernels,
    resources,
    traffic,
    whole,
)
from measure import batch, check, contenders, machine, step
from torch import Tensor

from lmf_kernels import lmf_loss

STEPS = ("forward", "backward")
CLASSES = (2, 7, 8, 100, 1000, 8142, 32000, 128256)
IMAGES = tuple((16, C, 512, 512) for C in (2, 5, 21, 150))
LIGER_SHAPE = (32, 32000)  # of (4096, 32000): what the emulator can run


# ---- tables ---------------------------------------------------------------------------------------------------------
def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resource_row(case: Case, dtype: torch.dtype, found: dict[tuple[str, str], Resources]) -> tuple[object, ...]:
    """Registers of (step, target), and what was spilled if anything was."""

    def cell(one: Resources) -> str:
        spills = f", {one.spilled} B spilled" if one.spilled else ""
        return f"{one.registers}" + spills + (f", {one.local} B local" if one.local else "")

    targets = dict.fromkeys(target for _, target in found)
    return (
        case.regime,
        case,
        name(dtype),
        *(" / ".join(cell(found[step, target]) for step in STEPS) for target in targets),
    )


def resource_table(cases: Sequence[Case], dtypes: Sequence[torch.dtype], targets: Sequence[str]) -> str:
    rows = []
    for case in cases:
        for dtype in dtypes:
            found = {
                (step, target): resources(kernel, target)
                for step, kernel in kernels(case, dtype).items()
                for target in targets
            }
            rows.append(resource_row(case, dtype, found))
    return table(("regime", "logits", "dtype", *targets), rows)


TRAFFIC = (
    "logits", "dtype", "load", "read / read + written", "sectors", "other B a row", "ex2 an element",
    "other MUFU a row", "instructions", "shared a row",
)  # fmt: skip


def traffic_row(case: Case, dtype: torch.dtype, found: dict[str, Traffic]) -> tuple[object, ...]:
    ahead, back = (found[step] for step in STEPS)
    return (
        case, name(dtype), f"{ahead.width} B",
        f"{ahead.read:.3f} / {back.read:.3f} + {back.written:.3f}",
        f"{ahead.read_sectors:.2f} / {back.read_sectors:.2f} + {back.written_sectors:.2f}",
        pair(ahead, back, "row_bytes"), pair(ahead, back, "exponentials", 2), pair(ahead, back, "mufu_a_row"),
        pair(ahead, back, "instructions"), pair(ahead, back, "shared_wavefronts"),
    )  # fmt: skip


def traffic_table(cases: Sequence[Case], dtypes: Sequence[torch.dtype]) -> str:
    rows = (traffic_row(case, dtype, traffic(case, dtype)) for case in cases for dtype in dtypes)
    return table(TRAFFIC, rows)


def pair(ahead: Traffic, back: Traffic, field: str, digits: int = 1) -> str:
    return " / ".join(f"{getattr(found, field):.{digits}f}" for found in (ahead, back))


def liger() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Liger's cross-entropy, if it is installed."""
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    except ImportError:
        return None
    return lambda logits, target: LigerCrossEntropyFunction.apply(logits, target, None)[0]


def peers(shape: tuple[int, ...] = LIGER_SHAPE) -> dict[str, Whole]:
    """Forward and backward in bfloat16: the LMF loss with margins and weights, and Liger's cross-entropy."""
    vector = torch.rand(shape[1])
    found = {
        "lmf_kernels, LMF loss": whole(
            lambda logits, target: lmf_loss(logits, target, margins=vector, weight=vector, backend="triton"),
            shape,
            torch.bfloat16,
        )
    }
    other = liger()
    if other is not None:
        found["Liger, cross-entropy"] = whole(other, shape, torch.bfloat16)
    return found


def peer_table(found: dict[str, Whole]) -> str:
    rows = (
        (
            who,
            f"{one.moved:.3f}",
            f"{one.row_bytes:.0f}",
            f"{one.bytes:.0f}",
            one.launches,
            len(one.operations),
            " ".join(one.operations) or "-",
        )
        for who, one in found.items()
    )
    header = (
        "",
        "logits + gradient moved",
        "other B a row",
        "bytes in all",
        "Triton launches",
        "other operations",
        "which",
    )
    return table(header, rows)


def host_table(times: dict[str, float]) -> str:
    return table(("host work", "us"), ((what, f"{us:.1f}") for what, us in times.items()))


# ---- a GPU ----------------------------------------------------------------------------------------------------------
Bench = Callable[[Callable[[], Any]], float]  # milliseconds


def measure(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], device: torch.device, bench: Bench, compiled: bool
) -> list[dict[str, Any]]:
    """Milliseconds and GB/s of forward + backward of each loss; GB/s count logits twice and the gradient once."""
    results = []
    for shape in shapes:
        for dtype in dtypes:
            logits, target = batch(shape, dtype, device)
            size = logits.numel() * logits.element_size()
            losses: dict[str, Any] = contenders(shape[1], device, compiled)
            del losses["floor"]
            if len(shape) == 2 and device.type == "cuda" and (other := liger()) is not None:
                losses["liger cross_entropy"] = other
            check(losses["lmf fused"], logits, target)
            copy = copy_gb_a_second(size, device, bench)
            for who, loss in losses.items():
                # Liger writes its gradient over the logits: it must not be given those of the others.
                own = logits.detach().clone().requires_grad_() if who.startswith("liger") else logits
                try:
                    milliseconds = bench(lambda loss=loss, own=own, target=target: step(loss, own, target))
                except torch.OutOfMemoryError:
                    milliseconds = math.nan
                logits.grad = None
                row = {"shape": "x".join(map(str, shape)), "dtype": name(dtype), "loss": who, "ms": milliseconds}
                row |= {"GB/s": 3 * size / milliseconds / 1e6, "copy GB/s": copy}
                results.append(row)
                print(
                    f"{row['shape']:>20} {row['dtype']:9} {who:20} {milliseconds:9.4f} ms {row['GB/s']:8.1f} GB/s",
                    flush=True,
                )
    return results


def copy_gb_a_second(size: int, device: torch.device, bench: Bench) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return 2 * size / bench(lambda: destination.copy_(source)) / 1e6


def save(results: Sequence[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "gpu_times.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)
    dtypes = list(dict.fromkeys(row["dtype"] for row in results))
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(10, 4.5 * len(dtypes)), squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        of_dtype = [row for row in results if row["dtype"] == dtype]
        shapes = list(dict.fromkeys(row["shape"] for row in of_dtype))
        for who in dict.fromkeys(row["loss"] for row in of_dtype):
            speed = {row["shape"]: row["GB/s"] for row in of_dtype if row["loss"] == who}
            axis.plot(range(len(shapes)), [speed.get(shape, math.nan) for shape in shapes], "o-", label=who)
        copies = [statistics.median(row["copy GB/s"] for row in of_dtype if row["shape"] == shape) for shape in shapes]
        axis.plot(range(len(shapes)), copies, "k--", label="device copy")
        axis.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right", fontsize=8)
        axis.set_ylabel("GB/s, forward + backward")
        axis.set_title(dtype)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "gpu_times.png", dpi=120)
    plt.close(figure)


def gpu_bench(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")


# ---- command --------------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of the CSV file and the plot")
    parser.add_argument("--quick", action="store_true", help="a few cases of each table")
    quick = parser.parse_args().quick
    out = parser.parse_args().out

    cases = CASES[1:3] if quick else CASES
    dtypes = DTYPES[:1] if quick else DTYPES
    targets = ("sm_90",) if quick else tuple(TARGETS)
    print("Registers a thread, forward / backward; spilled and local bytes only where there are any\n")
    print(resource_table(cases, dtypes, targets))
    print("\nCounts of the compiled code in the emulator, forward / backward\n")
    print(traffic_table(cases, dtypes[:2]))
    shape = (2, 32000) if quick else LIGER_SHAPE
    print(f"\nForward and backward together, {shape} bfloat16\n")
    print(peer_table(peers(shape)))
    print("\nHost time down to the driver's launch call, with (64, 7) logits\n")
    print(host_table(host_times(10 if quick else 200)))

    if torch.cuda.is_available():
        report_times(torch.device("cuda", torch.cuda.current_device()), quick, out)
    else:
        print("\nNo GPU here: nothing to measure.")


def report_times(device: torch.device, quick: bool, out: Path, bench: Bench = gpu_bench) -> None:
    print(f"\nMeasured on {machine(device)}\n")
    elements = 1 << (18 if quick else 28)
    shapes = [(max(1, elements // C), C) for C in CLASSES] + ([(2, 5, 16, 16)] if quick else list(IMAGES))
    save(measure(shapes, (torch.float32, torch.bfloat16), device, bench, compiled=not quick), out)
    print(f"\nSaved {out / 'gpu_times.csv'} and {out / 'gpu_times.png'}")


if __name__ == "__main__":
    main()
