"""The study's grid: the same small set of values for every loss, as far as the loss has the hyper-parameter."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from ..losses import FocalOptions, LDAMOptions, LMFOptions, LossOptions, WeightedCrossEntropyOptions

LEARNING_RATES = (1e-3, 5e-3)
SCALES = (1.0, 5.0, 10.0, 30.0)
GAMMAS = (0.5, 1.5)
WEIGHTS = ("none", "effective")


@dataclass(frozen=True)
class Point:
    """One combination of a loss, its hyper-parameters, the learning rate and the last layer."""

    loss: str
    lr: float
    head: str = "linear"
    options: LossOptions = field(default_factory=LossOptions)

    def describe(self) -> dict[str, Any]:
        """The hyper-parameters that matter, flat."""
        own = getattr(self.options, self.loss, None)
        return {"lr": self.lr, "head": self.head, **(vars(own) if own else {})}


def grid() -> list[Point]:
    """Every point among which each loss is chosen."""
    points = [replace(point, lr=lr) for point in _points() for lr in LEARNING_RATES]
    return list(dict.fromkeys(points))  # with s = 1, alpha = 1 and alpha = 1/s are the same


def cosine_points() -> list[Point]:
    """LDAM and LMF below a cosine classifier, for which s = 30 was made; shown beside the grid, not chosen from."""
    return [Point(loss, lr, "cosine") for loss in ("ldam", "lmf") for lr in LEARNING_RATES]


def _points() -> Iterator[Point]:
    yield Point("ce", 0)
    for weights in ("inverse", "effective"):
        yield Point("wce", 0, options=LossOptions(wce=WeightedCrossEntropyOptions(weights)))
    for gamma, weights in product(GAMMAS, WEIGHTS):
        yield Point("focal", 0, options=LossOptions(focal=FocalOptions(gamma, weights)))
    for s, weights in product(SCALES, WEIGHTS):
        yield Point("ldam", 0, options=LossOptions(ldam=LDAMOptions(s=s, class_weights=weights)))
    for s, weights in product(SCALES, WEIGHTS):
        for alpha in (1.0, 1.0 / s):
            lmf = LMFOptions(alpha=alpha, s=s, class_weights=weights)
            yield Point("lmf", 0, options=LossOptions(lmf=lmf))
