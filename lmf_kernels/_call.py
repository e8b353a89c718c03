"""The argument list of every op and kernel, once: what comes after logits and target.

    forward(logits, target, *tables, *options) -> (loss, saved, denominators)
    backward(grad_output, logits, target, saved, denominators, *options) -> grad_logits
    sums(logits, target, first_class, *options) -> sums

csrc/call.h has the same two lists in C++; tests compare the schemas.
"""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

NONE, MEAN, SUM = 0, 1, 2
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
BACKENDS = ("auto", "triton", "native", "reference")


class Tables(NamedTuple):
    """What a loss is given as tensors beside logits and target, each of any floating dtype; None is the default."""

    margins: Tensor | None = None  # (C,)
    ldam_weight: Tensor | None = None  # (C,)
    focal_weight: Tensor | None = None  # (C,)
    ldam_normalizer: Tensor | None = None  # ()
    focal_normalizer: Tensor | None = None  # ()


class Options(NamedTuple):
    """The numbers of a loss: reference.py's hyper-parameters, and the code of the reduction."""

    alpha: float
    beta: float
    gamma: float
    s: float
    ignore_index: int
    reduction: int


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool", str: "str"}


def schema_of(arguments: Any) -> str:
    """A NamedTuple's fields as an op's schema spells them."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in arguments.__annotations__.items())


def unpack(arguments: Iterable[Any], *kinds: Any) -> tuple[Any, ...]:
    """An op's flat arguments regrouped: one NamedTuple of each kind, and then what is left."""
    given = iter(arguments)
    return (*(kind(*itertools.islice(given, len(kind._fields))) for kind in kinds), *given)
