"""The paper's Tables 1 and 2 and its Figure 1 over several runs of train.py."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..output import write_text
from ..report.run import Run

TITLES = {"ham10000": "HAM10000", "isic2019": "ISIC-2019", "odir5k": "ODIR-5K"}


def title_of(run: Run) -> str:
    """The dataset and the model."""
    return f"{TITLES[run.dataset]}, {run.model}"


def write_report(runs: Sequence[Run], out: Path) -> None:
    """Print the tables; write them as Markdown and CSV, and Figure 1."""
    from .figure import plot_figure_1  # matplotlib is slow to import

    numbers = {
        "table_1": [run.table_1(f"{title_of(run)}: test metrics") for run in runs],
        "table_2": [run.table_2(f"{title_of(run)}: test F1 per class") for run in runs],
    }
    splits = "\n".join(f"split of {title_of(run)}: {run.split}" for run in runs)
    print("\n" + "\n\n".join(table.text() for tables in numbers.values() for table in tables) + f"\n\n{splits}\n")
    for name, tables in numbers.items():
        markdown = "\n\n".join(table.markdown() for table in tables)
        write_text(out / f"{name}.md", f"{markdown}\n\n{splits}\n")
        # One number per line, since the datasets have different classes.
        lines = {(TITLES[run.dataset], run.model): table.long() for run, table in zip(runs, tables, strict=True)}
        long = pd.concat(lines, names=["dataset", "model"]).droplevel(-1)
        write_text(out / f"{name}.csv", long.to_csv(lineterminator="\n"))
    plot_figure_1(runs, out / "figure_1.png")
    print(f"wrote {out}: table_1 and table_2 (.md, .csv), figure_1.png; its folders have the rest")
