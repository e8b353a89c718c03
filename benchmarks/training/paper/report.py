"""The paper's Tables 1 and 2 and its Figure 1 over several runs of train.py, from their results.json."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..checkpoint import RESULTS, record_of
from ..output import write_text
from ..record import Record
from ..report.comparison import table_1, table_2
from ..report.paper_numbers import PaperNumbers, paper_numbers
from ..report.tables import Table

TITLES = {"ham10000": "HAM10000", "isic2019": "ISIC-2019", "odir5k": "ODIR-5K"}


@dataclass(frozen=True)
class Run:
    """What train.py left for one dataset and model."""

    dataset: str
    model: str
    split: str
    class_names: list[str]
    train_counts: list[int]
    records: list[Record]
    paper: PaperNumbers | None

    @property
    def title(self) -> str:
        """The dataset and the model."""
        return f"{TITLES[self.dataset]}, {self.model}"

    def tables(self) -> list[Table]:
        """Tables 1 and 2."""
        first = table_1(self.records, self.paper, f"{self.title}: test metrics")
        title = f"{self.title}: test F1 per class"
        return [first, table_2(self.records, self.class_names, self.train_counts, self.paper, title)]


def read_run(folder: Path) -> Run | None:
    """The results of train.py in ``folder``; None if it has finished no training."""
    path = folder / RESULTS
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    config = results["config"]
    return Run(
        dataset=config["data"].partition(":")[0],
        model=config["model"],
        split=results["split"],
        class_names=results["class_names"],
        train_counts=results["train_counts"],
        records=[record_of(record) for record in results["records"]],
        paper=paper_numbers(config["data"], config["model"], results["class_names"]),
    )


def write_report(runs: Sequence[Run], out: Path) -> None:
    """Print the tables; write them as Markdown and CSV, and Figure 1."""
    from .figure import plot_figure_1  # matplotlib is slow to import

    numbers = list(zip(*(run.tables() for run in runs), strict=True))
    splits = "\n".join(f"split of {run.title}: {run.split}" for run in runs)
    print("\n" + "\n\n".join(table.text() for tables in numbers for table in tables) + f"\n\n{splits}\n")
    for i, tables in enumerate(numbers, start=1):
        markdown = "\n\n".join(table.markdown() for table in tables)
        write_text(out / f"table_{i}.md", f"{markdown}\n\n{splits}\n")
        # One number per line, since the datasets have different classes.
        lines = {(TITLES[run.dataset], run.model): table.long() for run, table in zip(runs, tables, strict=True)}
        long = pd.concat(lines, names=["dataset", "model"]).droplevel(-1)
        write_text(out / f"table_{i}.csv", long.to_csv(lineterminator="\n"))
    plot_figure_1(runs, out / "figure_1.png")
    print(f"wrote {out}: table_1 and table_2 (.md, .csv), figure_1.png; its folders have the rest")
