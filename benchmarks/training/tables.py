"""Tables of means and deviations, as text, Markdown and CSV; the best of each column is marked."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A number that was measured with several seeds."""

    mean: float
    deviation: float | None  # None with one seed
    paper: float | None = None  # what the paper prints

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"


@dataclass(frozen=True)
class Table:
    """Columns of numbers with a named row for each loss; larger is better. The paper's follow ours in brackets."""

    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]

    def text(self) -> str:
        """Aligned columns; the best of a column has a star."""
        blank = " " * len(_bracket(0.0)) if self.has_paper else ""
        rows = [
            [name, *(f"{cell}{'*' if best else ' '}{_bracket(cell.paper) or blank}" for cell, best in cells)]
            for name, cells in self._marked()
        ]
        head = [self.head[0], *(f"{name} {blank}" for name in self.head[1:])]
        return f"{self._title()} (* best)\n{aligned([head, *rows])}"

    def markdown(self) -> str:
        """A pipe table; the best of a column is bold."""
        rows = [
            [name, *((f"**{cell}**" if best else str(cell)) + _bracket(cell.paper) for cell, best in cells)]
            for name, cells in self._marked()
        ]
        ruler = [":--", *["--:"] * (len(self.head) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in [list(self.head), ruler, *rows]]
        return f"**{self._title()}**\n\n" + "\n".join(lines)

    def csv(self) -> str:
        """Plain numbers: a mean and a deviation column for each column, and the paper's where there are any."""
        kinds = ("mean", "deviation", "paper") if self.has_paper else ("mean", "deviation")
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([self.head[0], *(f"{name} {kind}" for name in self.head[1:] for kind in kinds)])
        for name, cells in self.rows:
            writer.writerow([name, *(getattr(cell, kind) for cell in cells for kind in kinds)])
        return out.getvalue()

    @property
    def has_paper(self) -> bool:
        """Whether some number of the paper is beside ours."""
        return any(cell.paper is not None for _, cells in self.rows for cell in cells)

    def _title(self) -> str:
        return f"{self.title}; in brackets the paper's" if self.has_paper else self.title

    def _marked(self) -> list[tuple[str, list[tuple[Cell, bool]]]]:
        columns = zip(*(cells for _, cells in self.rows), strict=True)
        best = [max(round(cell.mean, 3) for cell in column) for column in columns]
        return [
            (name, [(cell, round(cell.mean, 3) == top) for cell, top in zip(cells, best, strict=True)])
            for name, cells in self.rows
        ]


def cell(values: Sequence[float], paper: float | None = None) -> Cell:
    """The mean and the sample standard deviation over seeds."""
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, paper)


def _bracket(paper: float | None) -> str:
    return "" if paper is None else f" ({paper:.3f})"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns; the first row is the head and the first column is left-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)
