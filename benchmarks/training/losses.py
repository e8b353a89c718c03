"""The losses that are compared, a row for each, and their hyper-parameters; the paper's are the defaults."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, make_dataclass
from functools import partial
from typing import Any

import torch
from simple_parsing import choice
from torch import Tensor, nn

from lmf_kernels import (
    FocalLoss,
    LDAMLoss,
    LMFLoss,
    effective_number_weights,
    inverse_frequency_weights,
    ldam_margins,
)

from .errors import UserError

# Class weights from class counts. "margins" is what the official code gives to both terms of its LMF loss.
CLASS_WEIGHTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda counts: None,
    "inverse": inverse_frequency_weights,
    "effective": effective_number_weights,
    "margins": ldam_margins,
}


@dataclass(frozen=True)
class WeightedCrossEntropyOptions:
    """Options of the weighted cross-entropy."""

    class_weights: str = choice(*CLASS_WEIGHTS, default="inverse")


@dataclass(frozen=True)
class FocalOptions:
    """Options of the focal loss."""

    gamma: float = 1.5
    class_weights: str = choice(*CLASS_WEIGHTS, default="none")


@dataclass(frozen=True)
class LDAMOptions:
    """Options of the LDAM loss."""

    max_m: float = 0.5
    s: float = 30.0
    class_weights: str = choice(*CLASS_WEIGHTS, default="none")


@dataclass(frozen=True)
class LMFOptions:
    """Options of the LMF loss, fused and eager."""

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.5
    max_m: float = 0.5
    s: float = 30.0
    class_weights: str = choice(*CLASS_WEIGHTS, default="none")


@dataclass(frozen=True)
class Loss:
    """A loss: ``build(counts, weight=class_weights, **hyper_parameters)``."""

    label: str  # in tables
    color: str  # in pictures: Okabe and Ito's, which colour-blind people can tell apart
    build: Callable[..., nn.Module]
    options: Any = None  # a dataclass of the hyper-parameters, with class_weights; --NAME-FIELD on the command line
    options_of: str | None = None  # the loss whose options count


LOSSES = {
    "ce": Loss("Cross-entropy", "#000000", lambda counts: nn.CrossEntropyLoss()),
    "wce": Loss(
        "Weighted CE",
        "#999999",
        lambda counts, weight: nn.CrossEntropyLoss(weight=weight),
        WeightedCrossEntropyOptions(),
    ),
    "focal": Loss("Focal", "#56B4E9", lambda counts, **options: FocalLoss(**options), FocalOptions()),
    "ldam": Loss("LDAM", "#009E73", LDAMLoss, LDAMOptions()),
    "lmf": Loss("LMF (fused)", "#D55E00", LMFLoss, LMFOptions()),
    "lmf-eager": Loss("LMF (eager)", "#E69F00", partial(LMFLoss, backend="reference"), options_of="lmf"),
}
LABELS = {name: loss.label for name, loss in LOSSES.items()}
OPTIONS = {name: loss.options for name, loss in LOSSES.items() if loss.options is not None}
# The hyper-parameters of every loss that has some, by its name.
LossOptions = make_dataclass(
    "LossOptions",
    [(name, type(own), own) for name, own in OPTIONS.items()],
    frozen=True,
    namespace={"__module__": __name__},  # for pickle
)


def build_loss(name: str, counts: Sequence[int], options: LossOptions) -> nn.Module:
    """The loss ``name`` for classes with these training counts."""
    loss = LOSSES[name]
    own = getattr(options, loss.options_of or name, None)
    keywords = {} if own is None else asdict(own)
    try:
        if "class_weights" in keywords:
            keywords["weight"] = CLASS_WEIGHTS[keywords.pop("class_weights")](torch.as_tensor(counts))
        return loss.build(counts, **keywords)
    except ValueError as error:  # an option out of range; the message names it
        raise UserError(f"loss {name}: {error}") from error
