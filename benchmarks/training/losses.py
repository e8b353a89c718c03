"""The losses that are compared, their hyper-parameters (the paper's are the defaults) and their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
CLASS_WEIGHTS = {
    "none": lambda counts: None,
    "inverse": inverse_frequency_weights,
    "effective": effective_number_weights,
    "margins": ldam_margins,
}


@dataclass(frozen=True)
class WeightedCrossEntropyOptions:
    """Options of the weighted cross-entropy."""

    class_weights: str = "inverse"


@dataclass(frozen=True)
class FocalOptions:
    """Options of the focal loss."""

    gamma: float = 1.5
    class_weights: str = "none"


@dataclass(frozen=True)
class LDAMOptions:
    """Options of the LDAM loss."""

    max_m: float = 0.5
    s: float = 30.0
    class_weights: str = "none"


@dataclass(frozen=True)
class LMFOptions:
    """Options of the LMF loss, fused and eager."""

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.5
    max_m: float = 0.5
    s: float = 30.0
    class_weights: str = "none"


@dataclass(frozen=True)
class LossOptions:
    """The hyper-parameters of every loss; the field names are the options' prefixes."""

    wce: WeightedCrossEntropyOptions = WeightedCrossEntropyOptions()
    focal: FocalOptions = FocalOptions()
    ldam: LDAMOptions = LDAMOptions()
    lmf: LMFOptions = LMFOptions()


# What each loss is called in the tables.
LABELS = {
    "ce": "Cross-entropy",
    "wce": "Weighted CE",
    "focal": "Focal",
    "ldam": "LDAM",
    "lmf": "LMF (fused)",
    "lmf-eager": "LMF (eager)",
}


def build_loss(name: str, counts: Sequence[int], options: LossOptions) -> nn.Module:
    """The loss ``name`` for classes with these training counts."""
    try:
        return _build(name, counts, options)
    except ValueError as error:  # an option out of range; the message names it
        raise UserError(f"loss {name}: {error}") from error


def _build(name: str, counts: Sequence[int], options: LossOptions) -> nn.Module:
    match name:
        case "ce":
            return nn.CrossEntropyLoss()
        case "wce":
            return nn.CrossEntropyLoss(weight=_class_weights(options.wce, counts))
        case "focal":
            return FocalLoss(gamma=options.focal.gamma, weight=_class_weights(options.focal, counts))
        case "ldam":
            return LDAMLoss(counts, **_keywords(options.ldam, counts))
        case "lmf":
            return LMFLoss(counts, **_keywords(options.lmf, counts))
        case "lmf-eager":
            return LMFLoss(counts, **_keywords(options.lmf, counts), backend="reference")
    raise UserError(f"loss {name!r} is unknown, expected one of: {', '.join(LABELS)}")


def _keywords(options: LDAMOptions | LMFOptions, counts: Sequence[int]) -> dict[str, Any]:
    keywords = dict(vars(options))
    del keywords["class_weights"]
    return {**keywords, "weight": _class_weights(options, counts)}


def _class_weights(options: Any, counts: Sequence[int]) -> Tensor | None:
    return CLASS_WEIGHTS[options.class_weights](torch.as_tensor(counts))
