"""What the ops of a linear classifier take beside the lists of `.._call`."""

from typing import NamedTuple

from torch import Tensor


class Classifier(NamedTuple):
    features: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)


class HeadOptions(NamedTuple):
    normalize: bool
    backend: str
    memory_budget: int  # bytes; 0 is the default


Needs = tuple[bool, bool, bool]  # which gradients are needed: of features, weight and bias
