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

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"


@dataclass(frozen=True)
class Table:
    """Columns of numbers with a named row for each loss; larger is better."""

    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]

    def text(self) -> str:
        """Aligned columns; the best of a column has a star."""
        rows = [[name, *(f"{cell}{'*' if best else ' '}" for cell, best in cells)] for name, cells in self._marked()]
        return f"{self.title} (* best)\n{aligned([[self.head[0], *(f'{name} ' for name in self.head[1:])], *rows])}"

    def markdown(self) -> str:
        """A pipe table; the best of a column is bold."""
        rows = [
            [name, *(f"**{cell}**" if best else str(cell) for cell, best in cells)] for name, cells in self._marked()
        ]
        ruler = [":--", *["--:"] * (len(self.head) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in [list(self.head), ruler, *rows]]
        return f"**{self.title}**\n\n" + "\n".join(lines)

    def csv(self) -> str:
        """Plain numbers: a mean and a deviation column for each column."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = [f"{name} {kind}" for name in self.head[1:] for kind in ("mean", "deviation")]
        writer.writerow([self.head[0], *names])
        for name, cells in self.rows:
            writer.writerow([name, *(value for cell in cells for value in (cell.mean, cell.deviation))])
        return out.getvalue()

    def _marked(self) -> list[tuple[str, list[tuple[Cell, bool]]]]:
        columns = zip(*(cells for _, cells in self.rows), strict=True)
        best = [max(round(cell.mean, 3) for cell in column) for column in columns]
        return [
            (name, [(cell, round(cell.mean, 3) == top) for cell, top in zip(cells, best, strict=True)])
            for name, cells in self.rows
        ]


def cell(values: Sequence[float]) -> Cell:
    """The mean and the sample standard deviation over seeds."""
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


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
