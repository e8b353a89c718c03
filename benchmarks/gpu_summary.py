"""The Markdown tables and the plot of a GPU report, from the CSV files of its parts."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpu_rows import Row, read, table

LOSSES = ("lmf triton", "lmf native", "cross_entropy", "lmf eager", "lmf compiled", "liger cross_entropy")
PASSES = ("forward", "backward", "both")
TIMES = ("times", "compiled", "native")  # parts with rows of the same fields

Times = dict[tuple[str, str], dict[tuple[str, str], Row]]  # (logits, dtype) -> (loss, pass) -> row


def write(folder: Path, parts: Sequence[str], machine: str) -> None:
    """Writes report.md and report.png anew."""
    rows = {part: [row for row in read(folder / f"{part}.csv") if row["machine"] == machine] for part in parts}
    (folder / "report.md").write_text(markdown(rows, machine, left_out(folder, parts)))
    times = by_case(row for part in TIMES for row in rows.get(part, []))
    if times:
        plot(times, machine, folder / "report.png")


def left_out(folder: Path, parts: Sequence[str]) -> dict[str, list[str]]:
    files = {part: folder / f"{part}.left_out" for part in parts}
    return {part: file.read_text().splitlines() for part, file in files.items() if file.exists()}


def by_case(rows: Iterable[Row]) -> Times:
    found: Times = {}
    for row in rows:
        found.setdefault((row["logits"], row["dtype"]), {})[row["loss"], row["pass"]] = row
    return found


def markdown(rows: dict[str, list[Row]], machine: str, missing: dict[str, list[str]]) -> str:
    times = by_case(row for part in TIMES for row in rows.get(part, []))
    sections = [f"# Measured on {machine}"]

    def section(title: str, header: Sequence[str], body: Sequence[Sequence[object]]) -> None:
        if body:
            sections.append(f"## {title}\n\n{table(header, body)}")

    for fused in LOSSES[:2]:
        body = [(*case, *bandwidth(row, fused)) for case, row in times.items() if (fused, "both") in row]
        title = f"{fused}: GB/s of all bytes (logits, gradient, labels, saved statistics), and of a copy of as many"
        section(title, ("logits", "dtype", *PASSES, "copy, both", "largest relative error of the gradient"), body)
    body = [
        (*case, *("/".join(milliseconds(row.get((who, which))) for which in PASSES) for who in LOSSES))
        for case, row in times.items()
    ]
    section("Milliseconds of forward/backward/both", ("logits", "dtype", *LOSSES), body)
    for part in rows:
        if part not in TIMES and part not in ("tests", "native_tests"):
            fields = [name for name in (rows[part] or [{}])[0] if name not in ("error", "machine")]
            section(part, fields, [[row[name] for name in fields] for row in rows[part] if not row["error"]])
    for part in ("tests", "native_tests"):
        if rows.get(part):
            outcomes = [row["outcome"] or "not run" for row in rows[part]]
            counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
            sections.append(f"## {part}\n\n{counts}")
    errors = [
        (part, " ".join(value for name, value in row.items() if name not in ("error", "machine")), row["error"])
        for part, of_part in rows.items()
        for row in of_part
        if row["error"]
    ]
    section("Errors", ("part", "row", "error"), errors)
    section("Left out for want of time", ("part", "rows", "first"), [(p, len(m), m[0]) for p, m in missing.items()])
    return "\n\n".join(sections) + "\n"


def bandwidth(row: dict[tuple[str, str], Row], fused: str) -> list[str]:
    """GB/s of each pass and the share of a copy's, the copy's, and the error of the gradient."""
    cells = []
    for which in PASSES:
        speed, limit = value(row.get((fused, which)), "GB/s"), value(row.get(("copy", which)), "GB/s")
        cells.append("-" if math.isnan(speed) else f"{speed:.0f}" + f" ({speed / limit:.0%})" * (limit == limit))
    limit, error = (
        value(row.get(("copy", "both")), "GB/s"),
        value(row.get((fused, "gradient")), "error of the gradient"),
    )
    return [*cells, "-" if math.isnan(limit) else f"{limit:.0f}", "-" if math.isnan(error) else f"{error:.1e}"]


def milliseconds(row: Row | None) -> str:
    found = value(row, "ms")
    return "-" if math.isnan(found) else f"{found:.3f}"


def value(row: Row | None, field: str) -> float:
    return float(row[field]) if row and row[field] else math.nan


def plot(times: Times, machine: str, path: Path) -> None:
    """GB/s of forward + backward of each loss over the cases, and of the copy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(dtype for _, dtype in times))
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(12, 5 * len(dtypes)), squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        cases = [case for case, of in times if of == dtype]
        for who in ("copy", *LOSSES):
            speeds = [value(times[case, dtype].get((who, "both")), "GB/s") for case in cases]
            if not all(map(math.isnan, speeds)):
                axis.plot(range(len(cases)), speeds, "k--" if who == "copy" else "o-", label=who)
        axis.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=7)
        axis.set_ylabel("GB/s, forward + backward")
        axis.set_ylim(bottom=0)
        axis.set_title(dtype)
        axis.legend(fontsize=8)
    figure.suptitle(machine, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
