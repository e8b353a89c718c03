"""Tables of means over seeds and their deviations, as text, Markdown and CSV; the best of each column is marked."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from .text import aligned


@dataclass(frozen=True)
class Table:
    """A row for each loss and a column for each number, of which larger is better.

    Attributes:
        title: What stands above it.
        mean: The numbers; its index has the name of the first column.
        deviation: Of the same shape; NaN with one seed.
        paper: Of the same shape, what the paper prints; NaN where that is nothing.
    """

    title: str
    mean: pd.DataFrame
    deviation: pd.DataFrame
    paper: pd.DataFrame

    @classmethod
    def over_seeds(cls, title: str, values: pd.DataFrame, paper: pd.DataFrame | None = None) -> "Table":
        """From a row for each training, whose first index level is the table's row."""
        rows = values.groupby(level=0, sort=False)
        mean = rows.mean()
        if paper is None:
            paper = pd.DataFrame(index=mean.index, columns=mean.columns, dtype=float)
        return cls(title, mean, rows.std(), paper)

    def text(self) -> str:
        """Aligned columns; the best of a column has a star, the paper's number follows in brackets."""
        cells, best = self._cells()
        brackets = self._brackets()
        width = len(" (0.000)") if self.has_paper else 0
        shown = cells + best.map(lambda is_best: "*" if is_best else " ") + brackets.map(lambda text: text.ljust(width))
        shown.columns = [f"{name} {'':{width}}" for name in shown.columns]
        return f"{self._title()} (* best)\n{aligned(_rows(shown))}"

    def markdown(self) -> str:
        """A pipe table; the best of a column is bold."""
        cells, best = self._cells()
        head, *rows = _rows(cells.mask(best, "**" + cells + "**") + self._brackets())
        lines = [head, [":--", *["--:"] * len(cells.columns)], *rows]
        return f"**{self._title()}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def csv(self) -> str:
        """Plain numbers: a mean and a deviation column for each column, and the paper's where there are any."""
        frames = self._frames()
        if not self.has_paper:
            del frames["paper"]
        columns = {f"{name} {kind}": frame[name] for name in self.mean for kind, frame in frames.items()}
        return pd.DataFrame(columns).to_csv(lineterminator="\n")

    def long(self) -> pd.DataFrame:
        """A row for each number: loss, column, mean, deviation, paper."""
        frames = {kind: frame.stack(future_stack=True) for kind, frame in self._frames().items()}
        return pd.DataFrame(frames).rename_axis(["loss", "column"]).reset_index()

    @property
    def has_paper(self) -> bool:
        """Whether some number of the paper is beside ours."""
        return bool(self.paper.notna().any(axis=None))

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {"mean": self.mean, "deviation": self.deviation, "paper": self.paper}

    def _title(self) -> str:
        return f"{self.title}; in brackets the paper's" if self.has_paper else self.title

    def _cells(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The numbers as text, and whether they are the best of their column as shown."""
        means = self.mean.map("{:.3f}".format)
        return means + _text(self.deviation, " ± {:.3f}"), means == means.max()

    def _brackets(self) -> pd.DataFrame:
        return _text(self.paper, " ({:.3f})")


def _text(numbers: pd.DataFrame, form: str) -> pd.DataFrame:
    return numbers.map(lambda number: "" if pd.isna(number) else form.format(number))


def _rows(frame: pd.DataFrame) -> Sequence[Sequence[str]]:
    return [[frame.index.name, *frame.columns], *map(list, frame.itertuples())]
