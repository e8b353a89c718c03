"""The argument list of every op and kernel, once: what comes after logits and target.

    forward(logits, target, *tables, *options) -> (loss, saved, denominators)
    backward(grad_output, logits, target, saved, denominators, *options) -> grad_logits
    sums(logits, target, first_class, *options) -> sums

csrc/call.h has the same two lists in C++; a test compares the schemas.
"""

from typing import NamedTuple

from torch import Tensor


class Tables(NamedTuple):
    """What a loss is given beside logits and target as tensors, each of any floating dtype, or None for the default."""

    margins: Tensor | None = None  # (C,)
    ldam_weight: Tensor | None = None  # (C,)
    focal_weight: Tensor | None = None  # (C,)
    ldam_normalizer: Tensor | None = None  # ()
    focal_normalizer: Tensor | None = None  # ()


class Options(NamedTuple):
    """The numbers of a loss: reference.py's hyper-parameters, and a code of reference.py for the reduction."""

    alpha: float
    beta: float
    gamma: float
    s: float
    ignore_index: int
    reduction: int


_SCHEMA_TYPES = {float: "float", int: "int", Tensor | None: "Tensor?"}


def schema_of(arguments: type[Tables] | type[Options]) -> str:
    """The list as an op's schema spells it."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in arguments.__annotations__.items())
