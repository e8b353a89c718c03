"""The study's tables and pictures, from its records alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..losses import LABELS, LOSSES
from ..output import write_text
from ..report.plots import save
from ..report.tables import Table
from .grid import SCALES

COMPARED = ("ce", "wce", "focal", "ldam", "lmf")
RUN = ["data", "seed"]  # within which validation chooses
NAMES = {
    "digits": "digits, ratio 56",
    "digits:20": "digits, ratio 21",
    "keel:cleveland": "cleveland",
    "keel:dermatology": "dermatology",
    "keel:newthyroid": "newthyroid",
}


def frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row for each training, a column for each hyper-parameter; ``default`` tells the paper's points."""
    columns = pd.json_normalize(list(records)).rename(columns=lambda name: name.removeprefix("options."))
    return columns.assign(default=[is_default(record) for record in records])


def is_default(record: dict[str, Any]) -> bool:
    """Whether the loss has the paper's hyper-parameters; the learning rate is still chosen."""
    defaults = LOSSES[record["loss"]].options
    return defaults is None or vars(defaults).items() <= record["options"].items()


def complete(points: pd.DataFrame) -> pd.DataFrame:
    """The points of the seeds for which every dataset has every point."""
    sizes = points.groupby("seed")["seed"].transform("size")
    return points[sizes == sizes.max()]


def winners(points: pd.DataFrame) -> pd.DataFrame:
    """For each dataset and seed the points that validation finds best; several where it finds them equally good."""
    return points[points["val_macro_f1"] == points.groupby(RUN)["val_macro_f1"].transform("max")]


def over_seeds(title: str, points: pd.DataFrame, rows: dict[str, pd.Series]) -> Table:
    """Test macro F1 of what validation chooses among each row's points; equally good ones count with their mean."""
    chosen = {name: winners(points[kept]).groupby(RUN)["macro_f1"].mean() for name, kept in rows.items()}
    values = pd.concat(chosen, names=["Loss"]).unstack("data")
    datasets = list(dict.fromkeys([*NAMES, *sorted(values)]))
    values = values.reindex(columns=[name for name in datasets if name in values])
    table = Table.over_seeds(title, values.rename(columns=NAMES).rename_axis(columns=None))
    order = list(rows)
    return Table(title, table.mean.loc[order], table.deviation.loc[order], table.paper.loc[order])


def tables(points: pd.DataFrame) -> list[Table]:
    """What docs/choosing.md quotes."""
    spread = f"test macro F1, mean ± standard deviation over {points['seed'].nunique()} seeds"
    linear = points[points["head"] == "linear"]
    loss = linear["loss"]
    rows = {
        "Hyper-parameters chosen on validation": {_name(name): loss == name for name in COMPARED},
        "The paper's hyper-parameters, learning rate chosen on validation": {
            _name(name): (loss == name) & linear["default"] for name in COMPARED
        },
        "The scale s, everything else chosen on validation": {
            f"{_name(name)}, s = {s:g}": (loss == name) & (linear["s"] == s) for name in ("ldam", "lmf") for s in SCALES
        },
        "alpha of LMF (beta = 1), everything else chosen on validation": {
            "LMF, alpha = 1": (loss == "lmf") & (linear["alpha"] == 1),
            "LMF, alpha = 1/s": (loss == "lmf") & (linear["alpha"] == 1 / linear["s"]),
        },
        "Class weights, everything else chosen on validation": {
            f"{_name(name)}, {'with' if kind == 'effective' else 'no'} weights": (loss == name)
            & (linear["class_weights"] == kind)
            for name in ("focal", "ldam", "lmf")
            for kind in ("none", "effective")
        },
        "The learning rate, the paper's other hyper-parameters": {
            f"{_name(name)}, lr {lr:g}": (loss == name) & linear["default"] & (linear["lr"] == lr)
            for name in COMPARED
            for lr in sorted(linear["lr"].unique())
        },
    }
    found = [over_seeds(f"{title}: {spread}", linear, kept) for title, kept in rows.items()]
    return found + _cosine(points)


def _cosine(points: pd.DataFrame) -> list[Table]:
    points = points[points["data"].isin(points["data"][points["head"] == "cosine"]) & points["default"]]
    if points.empty:
        return []
    rows = {
        f"{_name(loss)}, {head} classifier": (points["loss"] == loss) & (points["head"] == head)
        for loss in ("ldam", "lmf")
        for head in ("linear", "cosine")
    }
    title = "The last layer with the paper's hyper-parameters (s = 30), learning rate chosen on validation"
    return [over_seeds(f"{title}: test macro F1", points, rows)]


def plot_scales(points: pd.DataFrame, path: Path) -> None:
    """Test macro F1 against s, a panel for each dataset, everything else chosen on validation."""
    chosen, _, scales, *_ = tables(points)
    datasets = list(chosen.mean)
    figure, grid = plt.subplots(
        1, len(datasets), figsize=(2.9 * len(datasets), 3.6), layout="constrained", squeeze=False
    )
    for axes, name in zip(grid[0], datasets, strict=True):
        for loss in ("ce", "focal"):
            label, color = _name(loss), LOSSES[loss].color
            axes.axhline(chosen.mean.loc[label, name], color=color, linewidth=1.4, linestyle=":", label=label)
        for loss in ("ldam", "lmf"):
            rows = [f"{_name(loss)}, s = {s:g}" for s in SCALES]
            axes.errorbar(
                np.arange(len(SCALES)) + (0.05 if loss == "lmf" else -0.05),
                scales.mean.loc[rows, name],
                scales.deviation.loc[rows, name].fillna(0),
                color=LOSSES[loss].color,
                marker="o",
                capsize=2,
                label=_name(loss),
            )
        axes.set_xticks(range(len(SCALES)), [f"{s:g}" for s in SCALES])
        axes.set(xlabel="scale s", title=name)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("test macro F1")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, path, dpi=110)


def choices(points: pd.DataFrame) -> str:
    """How often validation chose each hyper-parameter of focal, LDAM and LMF (ties count in parts)."""
    runs = len(points[RUN].drop_duplicates())
    lines = []
    for loss, names in {
        "focal": ("class_weights", "gamma", "lr"),
        "ldam": ("class_weights", "lr", "s"),
        "lmf": ("class_weights", "lr", "s"),
    }.items():
        best = winners(points[(points["loss"] == loss) & (points["head"] == "linear")])
        share = 1 / best.groupby(RUN)["seed"].transform("size") / runs
        shares = {f"{name} {value}": part for name in names for value, part in share.groupby(best[name]).sum().items()}
        lines.append(f"- {_name(loss)}: " + ", ".join(f"{name} {part:.0%}" for name, part in sorted(shares.items())))
    return "How often validation chose a value (ties count in parts):\n\n" + "\n".join(lines)


def write_report(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """study.md and study_scale.png in ``folder``."""
    points = complete(frame(records))
    parts = [table.markdown() for table in tables(points)]
    text = "\n\n".join(["# The study's tables", "Written by `python benchmarks/study.py`.", *parts, choices(points)])
    write_text(folder / "study.md", text + "\n")
    plot_scales(points, folder / "study_scale.png")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of study.json, none if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else []


def _name(loss: str) -> str:
    return "LMF" if loss == "lmf" else LABELS[loss]
