"""One finished training."""

from dataclasses import asdict, dataclass
from typing import Any

from .loop import Outcome
from .losses import LABELS


@dataclass(frozen=True)
class Record:
    """A loss, a seed and what came out."""

    loss: str
    seed: int
    outcome: Outcome

    def summary(self) -> str:
        """One line."""
        test = self.outcome.test
        return (
            f"{LABELS[self.loss]:<14} seed {self.seed}: test macro F1 {test.macro_f1:.3f}, "
            f"accuracy {test.accuracy:.3f} (best epoch {self.outcome.best_epoch})"
        )

    def as_json(self) -> dict[str, Any]:
        """A flat record for results.json."""
        outcome = asdict(self.outcome)
        return {"loss": self.loss, "seed": self.seed, **outcome.pop("test"), **outcome}
