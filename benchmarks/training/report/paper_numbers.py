"""What the paper's own tables print, shown beside ours: the numbers of paper_numbers.toml."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..losses import LABELS
from ..metrics import METRICS
from ..toml import read_toml

FILE = Path(__file__).with_name("paper_numbers.toml")
DATASETS = ("ham10000", "isic2019", "odir5k")
PER_CLASS = "per_class_f1"


@dataclass(frozen=True)
class PaperNumbers:
    """The paper's numbers for one dataset and one model: for each loss its metrics and its F1 of classes."""

    losses: dict[str, dict[str, Any]] = field(default_factory=dict)

    def metric(self, loss: str, name: str) -> float | None:
        """A number of Table 1."""
        return self._of(loss).get(name)

    def class_f1(self, loss: str, class_name: str) -> float | None:
        """A number of Table 2."""
        return self._of(loss).get(PER_CLASS, {}).get(class_name)

    def _of(self, loss: str) -> dict[str, Any]:
        return self.losses.get(loss.removesuffix("-eager"), {})  # eager LMF is the same loss


def paper_numbers(data: str, model: str, class_names: Sequence[str], path: Path = FILE) -> PaperNumbers | None:
    """The numbers for ``--data`` and ``--model``; None when the data are none of the paper's."""
    dataset, _, _ = data.partition(":")
    if dataset not in DATASETS:
        return None
    losses = read_toml(path).get(dataset, {}).get(model, {})
    for loss, numbers in losses.items():
        _check(f"{path}: [{dataset}.{model}.{loss}]", loss, numbers, class_names)
    return PaperNumbers(losses)


def _check(place: str, loss: str, numbers: dict[str, Any], class_names: Sequence[str]) -> None:
    if loss not in LABELS:
        raise UserError(f"{place}: the loss is unknown, expected one of: {', '.join(LABELS)}")
    unknown = numbers.keys() - {*METRICS, PER_CLASS}
    if unknown:
        raise UserError(f"{place} has the unknown key {min(unknown)}, expected {', '.join(METRICS)} or {PER_CLASS}")
    strangers = [name for name in numbers.get(PER_CLASS, {}) if name not in class_names]
    if strangers:
        raise UserError(f"{place} has the unknown class {strangers[0]}, expected one of: {', '.join(class_names)}")
    values = {name: numbers[name] for name in METRICS if name in numbers} | numbers.get(PER_CLASS, {})
    for name, value in values.items():
        if not isinstance(value, float) or not 0 <= value <= 1:
            raise UserError(f"{place}: {name} is {value!r}, expected a fraction from 0.0 to 1.0 (not percent)")
