"""Pictures of the results."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

from ..losses import LABELS, LOSSES
from ..output import write_atomically
from .run import Run


def plot_curves(run: Run, path: Path) -> None:
    """Training loss and validation macro F1 per epoch: means over seeds, with the range as a band."""
    figure, (loss_axes, f1_axes) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for loss, group in run.by_loss.items():
        for axes, field in ((loss_axes, "train_loss"), (f1_axes, "val_macro_f1")):
            values = np.array([getattr(record.outcome.history, field) for record in group])  # (seeds, epochs)
            epochs = np.arange(1, values.shape[1] + 1)
            style = "--" if loss == "lmf-eager" else "-"
            axes.plot(epochs, values.mean(0), style, color=LOSSES[loss].color, label=LABELS[loss], linewidth=1.6)
            axes.fill_between(epochs, values.min(0), values.max(0), color=LOSSES[loss].color, alpha=0.12, linewidth=0)
    loss_axes.set(xlabel="epoch", ylabel="training loss (log scale)", yscale="log", title="Training loss")
    f1_axes.set(xlabel="epoch", ylabel="macro F1", title="Validation macro F1")
    for axes in (loss_axes, f1_axes):
        axes.grid(alpha=0.3)
    if run.seeds > 1:
        figure.suptitle("Lines: mean over seeds; bands: smallest to largest", fontsize=10)
    _legend_below(figure, loss_axes)
    save(figure, path)


def plot_per_class_f1(run: Run, path: Path) -> None:
    """Test F1 of every class as grouped bars: means over seeds, with the standard deviation."""
    _plot_f1(run, range(len(run.class_names)), "Test F1 per class", path)


def plot_rare_f1(run: Run, path: Path) -> None:
    """The paper's Figure 1: test F1 of the three rarest classes."""
    _plot_f1(run, run.rarest, f"Test F1 of the {len(run.rarest)} rarest classes", path)


def _plot_f1(run: Run, classes: Sequence[int] | np.ndarray, title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(max(9.0, 1.4 * len(classes) + 1), 4.4), layout="constrained")
    draw_f1(axes, run, classes)
    axes.set_title(f"{title}: mean and standard deviation over seeds" if run.seeds > 1 else title)
    _legend_below(figure, axes)
    save(figure, path)


def draw_f1(axes: plt.Axes, run: Run, classes: Sequence[int] | np.ndarray) -> None:
    """The bars of some classes: a group for each class, a colour for each loss."""
    table = run.table_2()
    mean, deviation = table.mean.iloc[:, classes], table.deviation.iloc[:, classes]
    # (losses, 2, classes) lengths, none of which leaves [0, 1]
    bars = np.stack([np.minimum(deviation, mean), np.minimum(deviation, 1 - mean)], axis=1)
    mean.T.plot.bar(
        ax=axes,
        width=0.84,
        yerr=None if np.isnan(bars).any() else bars,
        color=[LOSSES[loss].color for loss in run.by_loss],
        error_kw={"elinewidth": 0.8, "ecolor": "#555555"},
        rot=0,
        legend=False,
    )
    names = [f"{fill(run.class_names[c], 14, break_long_words=False)}\n{run.train_counts[c]} images" for c in classes]
    axes.set_xticks(range(len(classes)), names)
    axes.set(ylabel="test F1", ylim=(0, 1.05), xlabel="class and its training images")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def plot_confusion(run: Run, path: Path) -> None:
    """A confusion matrix for each loss: shares of each true class, all seeds together."""
    groups = run.by_loss
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    names = [name if len(name) <= 22 else f"{name[:20]} …" for name in run.class_names]
    side = max(3.0, 0.55 * len(names) + 0.8 + 0.07 * max(map(len, names)))
    figure, grid = plt.subplots(
        rows, columns, figsize=(side * columns + 0.8, side * rows + 0.4), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(groups) :]:
        axes.set_axis_off()
    for axes, (loss, group) in zip(grid.flat, groups.items(), strict=False):
        counts = np.sum([record.outcome.test.confusion for record in group], axis=0)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        display = ConfusionMatrixDisplay(shares, display_labels=names).plot(
            ax=axes,
            cmap="Blues",
            include_values=len(names) <= 12,
            values_format=".2f",
            xticks_rotation=45 if max(map(len, names)) > 3 else 0,
            colorbar=False,
            im_kw={"vmin": 0, "vmax": 1},
            text_kw={"fontsize": 7},
        )
        axes.tick_params(labelsize=8)
        axes.set(xlabel="predicted class", ylabel="true class", title=LABELS[loss])
    figure.colorbar(display.im_, ax=grid, label="share of the true class", shrink=0.8)
    save(figure, path)


def plot_overlays(
    images: np.ndarray, truths: Sequence[str], overlays: dict[str, tuple[np.ndarray, list[str]]], path: Path
) -> None:
    """The paper's Figure 2: a row for each test sample, the image first, then the Grad-CAM overlay of each loss.

    Args:
        images: (n, h, w, 3) in [0, 1].
        truths: n class names.
        overlays: for each loss (n, h, w, 3) in [0, 1], and n predicted class names.
        path: where the picture goes.
    """
    columns = len(overlays) + 1
    figure, grid = plt.subplots(
        len(images), columns, figsize=(1.9 * columns, 2.25 * len(images)), layout="constrained", squeeze=False
    )
    for row, (axes, image, truth) in enumerate(zip(grid, images, truths, strict=True)):
        axes[0].imshow(image)
        axes[0].set_title(fill(f"true: {truth}", 24), fontsize=9)
        for cell_axes, (loss, (pictures, predicted)) in zip(axes[1:], overlays.items(), strict=True):
            cell_axes.imshow(pictures[row])
            right = predicted[row] == truth
            cell_axes.set_title(
                f"{LABELS[loss]}\n{fill(predicted[row] + ('' if right else ' (wrong)'), 24)}",
                fontsize=9,
                color="black" if right else "#B00020",
            )
    for axes in grid.flat:
        axes.set_axis_off()
    save(figure, path)


# Of each run; Grad-CAM's overlays are beside them.
PICTURES = {
    "curves.png": plot_curves,
    "per_class_f1.png": plot_per_class_f1,
    "rare_f1.png": plot_rare_f1,
    "confusion.png": plot_confusion,
}


def _legend_below(figure: Figure, axes: plt.Axes) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, columnspacing=1.4
    )


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write the picture and forget it."""
    write_atomically(path, lambda file: figure.savefig(file, dpi=dpi))
    plt.close(figure)
