"""What comes out, as text: the paper's Table 1 and Table 2, and the share of time that the loss takes."""

from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from ..losses import LABELS
from ..metrics import METRICS
from ..record import Record
from .paper_numbers import PaperNumbers
from .tables import Table
from .text import aligned


def by_loss(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each loss, in the order of the tables."""
    found = list(records)
    groups = {loss: [record for record in found if record.loss == loss] for loss in LABELS}
    return {loss: group for loss, group in groups.items() if group}


def table_1(records: Sequence[Record], paper: PaperNumbers | None = None, title: str = "Test metrics") -> Table:
    """The metrics of each loss."""
    paper = paper or PaperNumbers()
    return _table(
        f"Table 1. {title}, {_spread(records)}",
        list(METRICS.values()),
        records,
        lambda record: [getattr(record.outcome.test, metric) for metric in METRICS],
        lambda loss: [paper.metric(loss, metric) for metric in METRICS],
    )


def table_2(
    records: Sequence[Record],
    class_names: Sequence[str],
    train_counts: Sequence[int],
    paper: PaperNumbers | None = None,
    title: str = "Test F1 per class",
) -> Table:
    """Per-class F1 of each loss; the classes are the columns, with their training counts."""
    paper = paper or PaperNumbers()
    return _table(
        f"Table 2. {title} (training images of the class), {_spread(records)}",
        [f"{name} ({count})" for name, count in zip(class_names, train_counts, strict=True)],
        records,
        lambda record: record.outcome.test.per_class_f1,
        lambda loss: [paper.class_f1(loss, name) for name in class_names],
    )


def _table(
    title: str,
    columns: Sequence[str],
    records: Sequence[Record],
    ours: Callable[[Record], Sequence[float]],
    papers: Callable[[str], Sequence[float | None]],
) -> Table:
    trainings = [record for group in by_loss(records).values() for record in group]
    rows = pd.Index([LABELS[record.loss] for record in trainings], name="Loss")
    printed = [papers(loss) for loss in by_loss(records)]
    return Table.over_seeds(
        title,
        pd.DataFrame([ours(record) for record in trainings], rows, columns),
        pd.DataFrame(printed, rows.unique(), columns, dtype=float),
    )


def time_table(records: Sequence[Record]) -> str:
    """Images per second of the whole training loop, and what the loss takes of it."""
    columns = {"images_per_second": "images/s", "loss_ms": "loss ms/step", "loss_share": "share of time"}
    outcomes = [{"loss": loss, **vars(r.outcome)} for loss, group in by_loss(records).items() for r in group]
    medians = pd.DataFrame(outcomes).groupby("loss", sort=False)[list(columns)].median()
    rows = [[LABELS[loss], f"{rate:.0f}", f"{ms:.3f}", f"{part:.1%}"] for loss, rate, ms, part in medians.itertuples()]
    text = aligned([["Loss", *columns.values()], *rows])
    title = "Time. Whole training loop, and loss forward + backward per step (medians)"
    return f"{title}\n{text}{_fused_against_eager(medians)}"


def _fused_against_eager(medians: pd.DataFrame) -> str:
    if not {"lmf", "lmf-eager"} <= set(medians.index):
        return ""
    fused, eager = medians.loc["lmf"], medians.loc["lmf-eager"]
    return (
        f"\nLMF fused against eager: loss {fused.loss_ms:.3f} against {eager.loss_ms:.3f} ms a step "
        f"({eager.loss_ms / fused.loss_ms:.1f}x), whole loop {fused.images_per_second:.0f} against "
        f"{eager.images_per_second:.0f} images/s ({fused.images_per_second / eager.images_per_second:.2f}x).\n"
        "Both are the same loss: they differ in rounding alone, which grows over the epochs. Differences between\n"
        "other losses that are not larger than that mean nothing."
    )


def _spread(records: Sequence[Record]) -> str:
    seeds = len({record.seed for record in records})
    return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"
