"""The study's tables and pictures, from its records alone."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .grid import SCALES
from .losses import LABELS, LOSSES
from .output import write_atomically
from .tables import Cell, Table, cell

Records = Sequence[dict[str, Any]]
COMPARED = ("ce", "wce", "focal", "ldam", "lmf")
NAMES = {
    "digits": "digits, ratio 56",
    "digits:20": "digits, ratio 21",
    "keel:cleveland": "cleveland",
    "keel:dermatology": "dermatology",
    "keel:newthyroid": "newthyroid",
}


def chosen_score(records: Iterable[dict[str, Any]]) -> float:
    """One seed's test macro F1 of what validation chooses; the mean over points that validation finds equally good."""
    found = list(records)
    best = max(record["val_macro_f1"] for record in found)
    return float(np.mean([record["macro_f1"] for record in found if record["val_macro_f1"] == best]))


def over_seeds(records: Records, keep: Callable[[dict[str, Any]], bool]) -> Cell:
    """The chosen score among the kept points, mean and deviation over seeds."""
    kept = [record for record in records if keep(record)]
    seeds = sorted({record["seed"] for record in kept})
    return cell([chosen_score(record for record in kept if record["seed"] == seed) for seed in seeds])


def complete(records: Records) -> Records:
    """The records of the seeds for which every dataset has every point."""
    sizes: dict[int, int] = {}
    for record in records:
        sizes[record["seed"]] = sizes.get(record["seed"], 0) + 1
    whole = max(sizes.values())
    return [record for record in records if sizes[record["seed"]] == whole]


def is_default(record: dict[str, Any]) -> bool:
    """Whether the loss has the paper's hyper-parameters; the learning rate is still chosen."""
    defaults = LOSSES[record["loss"]].options
    return defaults is None or vars(defaults).items() <= record["options"].items()


def tables(records: Records) -> list[Table]:
    """What docs/choosing.md quotes."""
    datasets = _datasets(records)
    linear = [record for record in records if record["options"]["head"] == "linear"]
    heads = [NAMES.get(name, name) for name in datasets]

    def row(keep: Callable[[dict[str, Any]], bool], source: Records = linear) -> list[Cell]:
        return [over_seeds([r for r in source if r["data"] == name], keep) for name in datasets]

    def of(loss: str, **options: Any) -> Callable[[dict[str, Any]], bool]:
        return lambda r: r["loss"] == loss and all(r["options"][key] == value for key, value in options.items())

    seeds = len({record["seed"] for record in records})
    spread = f"test macro F1, mean ± standard deviation over {seeds} seeds"
    chosen = Table(
        f"Hyper-parameters chosen on validation: {spread}",
        ["Loss", *heads],
        [(_name(loss), row(of(loss))) for loss in COMPARED],
    )
    defaults = Table(
        f"The paper's hyper-parameters, learning rate chosen on validation: {spread}",
        ["Loss", *heads],
        [(_name(loss), row(lambda r, loss=loss: r["loss"] == loss and is_default(r))) for loss in COMPARED],
    )
    scales = Table(
        f"The scale s, everything else chosen on validation: {spread}",
        ["Loss", *heads],
        [(f"{_name(loss)}, s = {s:g}", row(of(loss, s=s))) for loss in ("ldam", "lmf") for s in SCALES],
    )
    balance = Table(
        f"alpha of LMF (beta = 1), everything else chosen on validation: {spread}",
        ["Loss", *heads],
        [
            ("LMF, alpha = 1", row(of("lmf", alpha=1.0))),
            ("LMF, alpha = 1/s", row(lambda r: r["loss"] == "lmf" and r["options"]["alpha"] == 1 / r["options"]["s"])),
        ],
    )
    weights = Table(
        f"Class weights, everything else chosen on validation: {spread}",
        ["Loss", *heads],
        [
            (f"{_name(loss)}, {'with' if kind == 'effective' else 'no'} weights", row(of(loss, class_weights=kind)))
            for loss in ("focal", "ldam", "lmf")
            for kind in ("none", "effective")
        ],
    )
    rates = sorted({record["options"]["lr"] for record in linear})
    learning = Table(
        f"The learning rate, the paper's other hyper-parameters: {spread}",
        ["Loss", *heads],
        [
            (
                f"{_name(loss)}, lr {lr:g}",
                row(lambda r, loss=loss, lr=lr: r["loss"] == loss and is_default(r) and r["options"]["lr"] == lr),
            )
            for loss in COMPARED
            for lr in rates
        ],
    )
    return [chosen, defaults, scales, balance, weights, learning, *_cosine(records)]


def _cosine(records: Records) -> list[Table]:
    datasets = _datasets([record for record in records if record["options"]["head"] == "cosine"])
    if not datasets:
        return []
    rows = [
        (
            f"{_name(loss)}, {head} classifier",
            [
                over_seeds(
                    [r for r in records if r["data"] == name and r["loss"] == loss and is_default(r)],
                    lambda r, head=head: r["options"]["head"] == head,
                )
                for name in datasets
            ],
        )
        for loss in ("ldam", "lmf")
        for head in ("linear", "cosine")
    ]
    title = (
        "The last layer with the paper's hyper-parameters (s = 30), learning rate chosen on validation: test macro F1"
    )
    return [Table(title, ["Loss", *(NAMES.get(name, name) for name in datasets)], rows)]


def plot_scales(records: Records, path: Path) -> None:
    """Test macro F1 against s, a panel a dataset, everything else chosen on validation."""
    records = [record for record in records if record["options"]["head"] == "linear"]
    datasets = _datasets(records)
    figure, grid = plt.subplots(
        1, len(datasets), figsize=(2.9 * len(datasets), 3.6), layout="constrained", squeeze=False
    )
    for axes, name in zip(grid[0], datasets, strict=True):
        own = [record for record in records if record["data"] == name]
        for loss in ("ce", "focal"):
            flat = over_seeds(own, lambda r, loss=loss: r["loss"] == loss)
            axes.axhline(flat.mean, color=LOSSES[loss].color, linewidth=1.4, linestyle=":", label=_name(loss))
        for loss in ("ldam", "lmf"):
            cells = [
                over_seeds(own, lambda r, loss=loss, s=s: r["loss"] == loss and r["options"]["s"] == s) for s in SCALES
            ]
            axes.errorbar(
                np.arange(len(SCALES)) + (0.05 if loss == "lmf" else -0.05),
                [value.mean for value in cells],
                [value.deviation or 0 for value in cells],
                color=LOSSES[loss].color,
                marker="o",
                capsize=2,
                label=_name(loss),
            )
        axes.set_xticks(range(len(SCALES)), [f"{s:g}" for s in SCALES])
        axes.set(xlabel="scale s", title=NAMES.get(name, name))
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("test macro F1")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, dpi=110))
    plt.close(figure)


def choices(records: Records) -> str:
    """How often validation chose each hyper-parameter of LMF and LDAM (ties count in parts)."""
    lines = []
    for loss in ("focal", "ldam", "lmf"):
        shares: dict[str, float] = {}
        runs = {(r["data"], r["seed"]) for r in records}
        for data, seed in runs:
            own = [
                r
                for r in records
                if (r["data"], r["seed"], r["loss"]) == (data, seed, loss) and r["options"]["head"] == "linear"
            ]
            best = max(r["val_macro_f1"] for r in own)
            winners = [r for r in own if r["val_macro_f1"] == best]
            for r in winners:
                for key in ("s", "gamma", "class_weights", "lr"):
                    if key in r["options"] and (loss != "lmf" or key != "gamma"):
                        name = f"{key} {r['options'][key]}"
                        shares[name] = shares.get(name, 0) + 1 / len(winners) / len(runs)
        lines.append(f"- {_name(loss)}: " + ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items())))
    return "How often validation chose a value (ties count in parts):\n\n" + "\n".join(lines)


def write_report(records: Records, folder: Path) -> None:
    """study.md and scale.png in ``folder``."""
    records = complete(records)
    parts = [table.markdown() for table in tables(records)]
    text = "\n\n".join(["# The study's tables", "Written by `python benchmarks/study.py`.", *parts, choices(records)])
    write_atomically(folder / "study.md", lambda file: file.write_text(text + "\n", encoding="utf-8"))
    plot_scales(records, folder / "study_scale.png")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of study.json, none if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else []


def _datasets(records: Records) -> list[str]:
    """The datasets of the records, the study's own ones first."""
    found = {record["data"] for record in records}
    return [name for name in NAMES if name in found] + sorted(found - NAMES.keys())


def _name(loss: str) -> str:
    return "LMF" if loss == "lmf" else LABELS[loss]
