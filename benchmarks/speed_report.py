"""Measures the LMF loss against plain cross-entropy and writes a table, a CSV file and two plots.

    python benchmarks/speed_report.py [--out results/speed] [--device cpu] [--quick]

Every result is checked against the float64 reference before it is timed. Times are forward + backward through
autograd; ratios are medians over interleaved rounds of one run.
"""

import argparse
import csv
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from measure import (
    batch,
    check,
    contenders,
    copy_bandwidth,
    interleaved,
    machine,
    ratio,
    step,
)
from peak_memory import allocated_peak
from tqdm import tqdm
from training import many_classes


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    bound: float | None = None  # of the ratio to cross-entropy; None is max(0.4, 1.3 x the floor's)


CASES = (
    Case((32, 8), bound=1.3),
    Case((512, 8), bound=1.0),
    Case((4096, 7), bound=0.6),
    Case((65536, 8)),
    Case((20000, 23)),
    Case((4096, 1000)),
    Case((8192, 8142)),
    Case((1024, 128256)),
    Case((1024, 128256), torch.bfloat16),
    Case((8, 5, 256, 256)),
    Case((2, 150, 128, 128)),
)
QUICK = (Case((32, 8), bound=1.3), Case((64, 100)), Case((2, 5, 16, 16)))
SWEEP = (2, 4, 8, 16, 32, 64, 100, 300, 1000, 3000, 8142, 32000, 128256)
SLOW = frozenset({"lmf eager", "lmf compiled"})


def measure_case(case: Case, device: torch.device, bandwidth: float, rounds: int) -> dict[str, object]:
    """One row of the table."""
    torch.compiler.reset()  # else the limit of recompilations turns later cases into eager ones
    logits, target = batch(case.shape, case.dtype, device)
    losses = contenders(case.shape[1], device)
    check(losses["lmf fused"], logits, target)
    seconds = interleaved(
        {name: lambda loss=loss: step(loss, logits, target) for name, loss in losses.items()}, device, rounds, SLOW
    )
    ratios = {name: ratio(seconds, name, "cross_entropy") for name in losses}
    bound = case.bound or max(0.4, 1.3 * ratios["floor"])
    size = logits.numel() * logits.element_size()
    moved = 3 * size  # read twice, written once
    extra = {}
    for name in ("cross_entropy", "lmf fused"):
        logits.grad = None
        extra[name] = allocated_peak(partial(step, losses[name], logits, target), device) - size
    return {
        "shape": "x".join(map(str, case.shape)),
        "dtype": str(case.dtype).removeprefix("torch."),
        "cross_entropy_us": 1e6 * statistics.median(seconds["cross_entropy"]),
        "lmf_us": 1e6 * statistics.median(seconds["lmf fused"]),
        "ratio": ratios["lmf fused"],
        "bound": bound,
        "floor_ratio": ratios["floor"],
        "eager_ratio": ratios["lmf eager"],
        "compiled_ratio": ratios["lmf compiled"],
        "extra_bytes_per_row": extra["lmf fused"] / target.numel(),
        "extra_memory_kept": extra["lmf fused"] <= 32 * target.numel() + (1 << 20),
        "cross_entropy_extra_bytes_per_row": extra["cross_entropy"] / target.numel(),
        "times_copy_limit": statistics.median(seconds["lmf fused"]) / (moved / bandwidth),
    }


def print_table(rows: list[dict[str, object]]) -> None:
    print(
        f"\n{'shape':>16} {'dtype':>9} {'CE us':>10} {'LMF us':>10} {'LMF/CE':>7} {'bound':>6} {'floor':>6} "
        f"{'eager':>6} {'compiled':>8} {'x copy limit':>12} {'B a row':>8} {'CE':>8}"
    )
    for row in rows:
        mark = " " if row["ratio"] <= row["bound"] else "!"
        print(
            f"{row['shape']:>16} {row['dtype']:>9} {row['cross_entropy_us']:>10.0f} {row['lmf_us']:>10.0f} "
            f"{row['ratio']:>6.2f}{mark} {row['bound']:>6.2f} {row['floor_ratio']:>6.2f} {row['eager_ratio']:>6.2f} "
            f"{row['compiled_ratio']:>8.2f} {row['times_copy_limit']:>12.1f} "
            f"{row['extra_bytes_per_row']:>7.1f}{' ' if row['extra_memory_kept'] else '!'} "
            f"{row['cross_entropy_extra_bytes_per_row']:>8.1f}"
        )
    print(
        "Ratios are to cross_entropy in the same rounds; 'B a row' is the peak of LMF (CE) beyond inputs and gradient, "
        "at most 32 and 1 MiB; '!' marks a bound that was missed."
    )


def measure_sweep(classes: tuple[int, ...], elements: int, device: torch.device, rounds: int) -> list[dict[str, float]]:
    """Nanoseconds an element over the number of classes, at a constant number of elements."""
    rows = []
    for num_classes in tqdm(classes, desc="classes", disable=None):
        logits, target = batch((max(1, elements // num_classes), num_classes), torch.float32, device)
        losses = contenders(num_classes, device, compiled=False)
        names = ("cross_entropy", "lmf fused", "floor")
        runs = {name: partial(step, losses[name], logits, target) for name in names}
        seconds = interleaved(runs, device, rounds)
        row = {name: 1e9 * statistics.median(seconds[name]) / logits.numel() for name in names}
        rows.append({"classes": num_classes, **row})
    return rows


def thread_scaling(shapes: tuple[tuple[int, ...], ...], rounds: int) -> list[tuple[str, float]]:
    """Time with one thread over time with all."""
    threads, results = torch.get_num_threads(), []
    device = torch.device("cpu")
    for shape in shapes:
        logits, target = batch(shape, torch.float32, device)
        loss = contenders(shape[1], device, compiled=False)["lmf fused"]

        def run(count: int, loss=loss, logits=logits, target=target) -> None:
            torch.set_num_threads(count)
            step(loss, logits, target)

        seconds = interleaved({"one": lambda run=run: run(1), "all": lambda run=run: run(threads)}, device, rounds)
        results.append(("x".join(map(str, shape)), ratio(seconds, "one", "all")))
    torch.set_num_threads(threads)
    return results


def plot_sweep(rows: list[dict[str, float]], bandwidth: float, title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    classes = [row["classes"] for row in rows]
    for name, style in (("cross_entropy", "o-"), ("lmf fused", "s-"), ("floor", "^--")):
        label = {"cross_entropy": "F.cross_entropy", "floor": "floor: amax and a scaled copy"}.get(name, name)
        axes.plot(classes, [row[name] for row in rows], style, label=label, markersize=4)
    limit = 12 / bandwidth * 1e9  # bytes of float32 that are read twice and written once
    axes.axhline(limit, color="black", linestyle=":", label="bytes moved / copy bandwidth")
    axes.set(xscale="log", yscale="log", xlabel="classes", ylabel="forward + backward, ns an element")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_speedup(rows: list[dict[str, object]], title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    labels = [f"{row['shape']}\n{row['dtype']}" for row in rows]
    series = (("eager_ratio", "LMF eager"), ("compiled_ratio", "LMF torch.compile"), ("ratio", "LMF fused"))
    for index, (key, label) in enumerate(series):
        places = [place + (index - 1) * 0.27 for place in range(len(rows))]
        bars = axes.bar(places, [1 / row[key] for row in rows], width=0.26, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=6, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), labels, rotation=40, ha="right", fontsize=7)
    axes.set_ylabel("speed relative to F.cross_entropy (1 is equal)")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/speed"), help="folder for the CSV file and plots")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    options = parser.parse_args(arguments)
    device, rounds = options.device, 3 if options.quick else 9
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    title = machine(device)
    bandwidth = copy_bandwidth(device, 1 << 24 if options.quick else 1 << 28)
    print(f"{title}\ncopy bandwidth {bandwidth / 1e9:.1f} GB/s (read + written)")
    cases = QUICK if options.quick else CASES
    rows = [measure_case(case, device, bandwidth, rounds) for case in tqdm(cases, desc="shapes", disable=None)]
    print_table(rows)

    logits, target = batch((1, 2), torch.float32, device)
    loss = contenders(2, device, compiled=False)["lmf fused"]
    host = interleaved(
        {"lmf": lambda: step(loss, logits, target), "ce": lambda: step(F.cross_entropy, logits, target)}, device, rounds
    )
    print(
        f"host overhead at (1, 2): {1e6 * statistics.median(host['lmf']):.1f} us, "
        f"cross_entropy {1e6 * statistics.median(host['ce']):.1f} us"
    )
    if device.type == "cpu" and torch.get_num_threads() > 1:
        shapes = ((256, 100),) if options.quick else ((65536, 8), (4096, 1000), (8192, 8142), (8, 5, 256, 256))
        for shape, scaling in thread_scaling(shapes, rounds):
            print(f"threads 1 -> {torch.get_num_threads()} at {shape}: {scaling:.2f} x")
    sizes = (64, 100, 64) if options.quick else (512, 20_000, 1024)
    print("training step, linear {} -> {}, batch {}:".format(*sizes))
    print(many_classes.table(many_classes.measure(device, *sizes, rounds)))
    sweep = measure_sweep(SWEEP[:4] if options.quick else SWEEP, 1 << (14 if options.quick else 24), device, rounds)

    with (options.out / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot_sweep(sweep, bandwidth, title, options.out / "time_by_classes.png")
    plot_speedup(rows, title, options.out / "speedup.png")
    wide = [row["lmf fused"] for row in sweep if row["classes"] >= 1000]
    if wide:
        print(f"time an element from C = 1000 on: {min(wide):.2f} to {max(wide):.2f} ns")
    print(f"wrote speed.csv, time_by_classes.png and speedup.png to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
