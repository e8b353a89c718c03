"""The paper's Figure 1."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from ..report.plots import draw_f1, save
from ..report.run import RARE, Run
from .report import title_of


def plot_figure_1(runs: Sequence[Run], path: Path) -> None:
    """The paper's Figure 1 over several runs: a column for each dataset, a row for each model."""
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    models = list(dict.fromkeys(run.model for run in runs))
    figure, grid = plt.subplots(
        len(models),
        len(datasets),
        figsize=(4.6 * len(datasets) + 0.6, 3.3 * len(models) + 0.6),
        layout="constrained",
        squeeze=False,
    )
    for axes in grid.flat:
        axes.set_axis_off()
    handles = {}
    for run in runs:
        axes = grid[models.index(run.model)][datasets.index(run.dataset)]
        axes.set_axis_on()
        draw_f1(axes, run, run.rarest)
        axes.set_title(title_of(run))
        bars, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, bars, strict=True))
    spread = ": mean and standard deviation over seeds" if any(run.seeds > 1 for run in runs) else ""
    figure.suptitle(f"Test F1 of the {RARE} rarest classes{spread}")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    save(figure, path)
