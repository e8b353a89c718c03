"""Finished trainings on one dataset with one model, and their Tables 1 and 2."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..checkpoint import RESULTS, record_of
from ..losses import LABELS
from ..metrics import METRICS
from ..record import Record
from .paper_numbers import PaperNumbers, paper_numbers
from .tables import Table

RARE = 3  # classes in the paper's Figure 1


@dataclass(frozen=True)
class Run:
    """What train.py leaves."""

    dataset: str
    model: str
    split: str
    class_names: Sequence[str]
    train_counts: Sequence[int]
    records: Sequence[Record]
    paper: PaperNumbers | None = None

    @property
    def by_loss(self) -> dict[str, list[Record]]:
        """The records of each loss, in the order of the tables."""
        groups = {loss: [record for record in self.records if record.loss == loss] for loss in LABELS}
        return {loss: group for loss, group in groups.items() if group}

    @property
    def seeds(self) -> int:
        """How many seeds the records are of."""
        return len({record.seed for record in self.records})

    @property
    def rarest(self) -> np.ndarray:
        """The classes of the paper's Figure 1, the rarest first."""
        return np.argsort(self.train_counts, kind="stable")[:RARE]

    def table_1(self, title: str = "Test metrics") -> Table:
        """The metrics of each loss."""
        return self._table(
            f"Table 1. {title}",
            list(METRICS.values()),
            lambda record: [getattr(record.outcome.test, metric) for metric in METRICS],
            lambda paper, loss: [paper.metric(loss, metric) for metric in METRICS],
        )

    def table_2(self, title: str = "Test F1 per class") -> Table:
        """Per-class F1 of each loss; the classes are the columns, with their training counts."""
        return self._table(
            f"Table 2. {title} (training images of the class)",
            [f"{name} ({count})" for name, count in zip(self.class_names, self.train_counts, strict=True)],
            lambda record: record.outcome.test.per_class_f1,
            lambda paper, loss: [paper.class_f1(loss, name) for name in self.class_names],
        )

    def _table(
        self,
        title: str,
        columns: Sequence[str],
        ours: Callable[[Record], Sequence[float]],
        papers: Callable[[PaperNumbers, str], Sequence[float | None]],
    ) -> Table:
        trainings = [record for group in self.by_loss.values() for record in group]
        rows = pd.Index([LABELS[record.loss] for record in trainings], name="Loss")
        printed = [papers(self.paper or PaperNumbers(), loss) for loss in self.by_loss]
        spread = f"mean ± standard deviation over {self.seeds} seeds" if self.seeds > 1 else "1 seed"
        return Table.over_seeds(
            f"{title}, {spread}",
            pd.DataFrame([ours(record) for record in trainings], rows, columns),
            pd.DataFrame(printed, rows.unique(), columns, dtype=float),
        )


def read_run(folder: Path) -> Run | None:
    """The results of train.py in ``folder``; None if it has finished no training."""
    path = folder / RESULTS
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    data, model = results["config"]["data"], results["config"]["model"]
    return Run(
        dataset=data.partition(":")[0],
        model=model,
        split=results["split"],
        class_names=results["class_names"],
        train_counts=results["train_counts"],
        records=[record_of(record) for record in results["records"]],
        paper=paper_numbers(data, model, results["class_names"]),
    )
