"""What comes out, as text: the paper's Table 1 and Table 2, and the share of time that the loss takes."""

import statistics
from collections.abc import Iterable, Sequence

from .losses import LABELS
from .paper_numbers import PaperNumbers
from .record import Record
from .tables import Table, aligned, cell

METRICS = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "Macro F1": "macro_f1"}


def by_loss(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each loss, in the order of the tables."""
    found = list(records)
    groups = {loss: [record for record in found if record.loss == loss] for loss in LABELS}
    return {loss: group for loss, group in groups.items() if group}


def table_1(records: Sequence[Record], paper: PaperNumbers | None = None, title: str = "Test metrics") -> Table:
    """Accuracy, macro precision, macro recall and macro F1 of each loss."""
    paper = paper or PaperNumbers()
    rows = [
        (
            LABELS[loss],
            [
                cell([getattr(r.outcome.test, metric) for r in group], paper.metric(loss, metric))
                for metric in METRICS.values()
            ],
        )
        for loss, group in by_loss(records).items()
    ]
    return Table(f"Table 1. {title}, {_spread(records)}", ["Loss", *METRICS], rows)


def table_2(
    records: Sequence[Record],
    class_names: Sequence[str],
    train_counts: Sequence[int],
    paper: PaperNumbers | None = None,
    title: str = "Test F1 per class",
) -> Table:
    """Per-class F1 of each loss; the classes are the columns, with their training counts."""
    paper = paper or PaperNumbers()
    heads = [f"{name} ({count})" for name, count in zip(class_names, train_counts, strict=True)]
    rows = [
        (
            LABELS[loss],
            [
                cell([r.outcome.test.per_class_f1[c] for r in group], paper.class_f1(loss, name))
                for c, name in enumerate(class_names)
            ],
        )
        for loss, group in by_loss(records).items()
    ]
    return Table(f"Table 2. {title} (training images of the class), {_spread(records)}", ["Loss", *heads], rows)


def time_table(records: Sequence[Record]) -> str:
    """Images a second of the whole training loop, and what the loss takes of it."""
    rows = [["Loss", "images/s", "loss ms/step", "share of time"]]
    for loss, group in by_loss(records).items():
        speed, milliseconds = _median(group, "images_per_second"), _median(group, "loss_ms")
        rows.append([LABELS[loss], f"{speed:.0f}", f"{milliseconds:.3f}", f"{_median(group, 'loss_share'):.1%}"])
    title = "Time. Whole training loop, and loss forward + backward per step (medians)"
    return f"{title}\n{aligned(rows)}{_fused_against_eager(by_loss(records))}"


def _fused_against_eager(groups: dict[str, list[Record]]) -> str:
    if not {"lmf", "lmf-eager"} <= groups.keys():
        return ""
    fused, eager = (_median(groups[loss], "loss_ms") for loss in ("lmf", "lmf-eager"))
    fused_speed, eager_speed = (_median(groups[loss], "images_per_second") for loss in ("lmf", "lmf-eager"))
    return (
        f"\nLMF fused against eager: loss {fused:.3f} against {eager:.3f} ms a step ({eager / fused:.1f}x), "
        f"whole loop {fused_speed:.0f} against {eager_speed:.0f} images/s ({fused_speed / eager_speed:.2f}x).\n"
        "Both are the same loss: they differ in rounding alone, which grows over the epochs. Differences between\n"
        "other losses that are not larger than that mean nothing."
    )


def _spread(records: Sequence[Record]) -> str:
    seeds = len({record.seed for record in records})
    return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"


def _median(group: Sequence[Record], attribute: str) -> float:
    return statistics.median(getattr(record.outcome, attribute) for record in group)
