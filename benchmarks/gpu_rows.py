"""Rows of results that outlive the run that made them: CSV files, written row by row and read back by the next run."""

import csv
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Row = dict[str, str]


class Restart(Exception):
    """The device answers no more in this process: the rest has to be run by another one."""


class Budget:
    """Seconds until no new row is begun."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


class Rows:
    """The results of one part of the report, by their keys, in `<folder>/<part>.csv`.

    `<part>.running` names the row that is being measured, so that a process that dies in it can be blamed on it, and
    `<part>.left_out` names those for which there was no time.
    """

    def __init__(self, folder: Path, part: str, keys: Sequence[str], values: Sequence[str], machine: str) -> None:
        self.part, self.keys, self.values, self.machine = part, tuple(keys), tuple(values), machine
        self.fields = (*self.keys, *self.values, "error", "machine")
        self.path = folder / f"{part}.csv"
        self.running = folder / f"{part}.running"
        self.left_out_path = folder / f"{part}.left_out"
        self.left_out: list[tuple[str, ...]] = []
        self.budget = Budget(math.inf)
        self.still_answers: Callable[[], None] = lambda: None
        folder.mkdir(parents=True, exist_ok=True)
        self.found = {self._key(row): row for row in read(self.path) if row["machine"] == machine}

    def _key(self, row: Row) -> tuple[str, ...]:
        return tuple(row[key] for key in self.keys)

    def missing(self, keys: Iterable[Sequence[object]]) -> list[tuple[str, ...]]:
        every = [tuple(map(str, key)) for key in keys]
        return [key for key in every if key not in self.found]

    def run(self, key: Sequence[object], measure: Callable[[], dict[str, object]]) -> None:
        """Adds the row that `measure` returns, or its exception; a row that is there, or for which time is out, not."""
        named = tuple(map(str, key))
        if named in self.found:
            return
        if self.budget.left() <= 0:
            self.left_out.append(named)
            return
        self.running.write_text("\n".join(named))
        try:
            self.add(named, measure())
        except Exception as error:
            self.add(named, {"error": one_line(error)})
            self._ask_the_device()
        self.running.unlink()

    def _ask_the_device(self) -> None:
        try:
            self.still_answers()
        except Exception as error:
            self.running.unlink()
            raise Restart from error

    def add(self, key: Sequence[str], values: dict[str, object]) -> None:
        row = dict.fromkeys(self.fields, "") | dict(zip(self.keys, key, strict=True)) | {"machine": self.machine}
        row |= {name: f"{v:.6g}" if isinstance(v, float) else str(v) for name, v in values.items()}
        new = not self.path.exists() or self.path.stat().st_size == 0
        with open(self.path, "a", newline="") as file:  # opened for each row: what is written is on disk
            writer = csv.DictWriter(file, self.fields)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.found[tuple(key)] = row
        shown = row["error"] or ", ".join(f"{name} {row[name]}" for name in self.values if row[name])
        print(f"{self.part}: {' | '.join(key)}: {shown}", flush=True)

    def blame(self, what: str) -> None:
        """Records `what` as the result of the row in which another process ended."""
        if self.running.exists():
            key = tuple(self.running.read_text().split("\n"))
            self.running.unlink()
            if key not in self.found:
                self.add(key, {"error": what})

    def close(self) -> None:
        """Says what was left out."""
        if not self.left_out:
            self.left_out_path.unlink(missing_ok=True)
            return
        lines = [" | ".join(key) for key in self.left_out]
        self.left_out_path.write_text("\n".join(lines) + "\n")
        print(f"{self.part}: no time left for {len(lines)} rows, {lines[0]} to {lines[-1]}", flush=True)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, without a last line that was cut off; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    return list(csv.DictReader(text.splitlines()))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])
