"""From class counts to margins and class weights."""

import math
import numbers

import torch
from torch import Tensor

from ._validate import as_float
from .counts import ClassCounts, checked_counts


def ldam_margins(cls_num_list: ClassCounts, max_m: float = 0.5, *, min_count: float | None = None) -> Tensor:
    """LDAM's label-distribution-aware margins: D_j = max_m * n_j^(-1/4) / max_k n_k^(-1/4).

    The rarest class gets the margin `max_m`. Source: Cao et al. 2019, "Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss", arXiv 1906.07413.

    Args:
        cls_num_list: training samples per class, n_j >= 1, length C: a list, tuple, array or tensor; or a dict, Counter
            or pandas Series, whose keys or index are the class indices 0..C-1, in any order.
        max_m: the largest margin, in units of logits, finite.
        min_count: classes with fewer samples, or none, count as this many, at least 1; None makes 0 an error.

    Returns:
        The margins, shape (C,), in torch's default dtype, on the CPU.

    Raises:
        TypeError, ValueError: a count is not a number of at least 1 (the message names the class), keys or index are
            not 0..C-1, or `max_m` is not a finite number.
    """
    check_max_m(max_m)
    counts = checked_counts(cls_num_list, min_count)
    return margins_from_rarest(counts, counts.min(), max_m)


def margins_from_rarest(counts: Tensor, rarest: Tensor, max_m: float) -> Tensor:
    """The margins of classes that need not be all of them; `rarest` is the smallest count of all."""
    return (float(max_m) * counts**-0.25 / rarest**-0.25).to(torch.get_default_dtype())


def check_max_m(max_m: float) -> None:
    _check_number("max_m", max_m)
    if not math.isfinite(as_float(max_m)):
        raise ValueError(f"max_m must be finite, got {max_m}")


def effective_number_weights(
    cls_num_list: ClassCounts, beta: float = 0.9999, *, min_count: float | None = None
) -> Tensor:
    """Class-balanced weights from effective numbers: w_j ~ (1 - beta) / (1 - beta^n_j), with sum C.

    Source: Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", arXiv 1901.05555; LDAM-DRW
    applies them late in training. beta = 0 gives ones.

    Args:
        cls_num_list: training samples per class, n_j >= 1, length C; see `ldam_margins`.
        beta: in [0, 1).
        min_count: as in `ldam_margins`.

    Returns:
        The weights, shape (C,), in torch's default dtype, on the CPU.

    Raises:
        TypeError, ValueError: a count below 1 (the message names the class), or `beta` outside [0, 1).
    """
    _check_number("beta", beta)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    counts = checked_counts(cls_num_list, min_count)
    if beta == 0:
        return torch.ones(len(counts), device="cpu")
    # 1 - beta^n without cancellation for beta near 1.
    weights = 1.0 / -torch.expm1(counts * math.log(beta))
    return (weights * (len(weights) / weights.sum())).to(torch.get_default_dtype())


def inverse_frequency_weights(cls_num_list: ClassCounts, *, min_count: float | None = None) -> Tensor:
    """Weights that fall linearly with the class frequency: w_j = (1 - n_j / sum_k n_k) / (C - 1), with sum 1.

    Source: the weighted cross-entropy of the LMF paper's official code.

    Args:
        cls_num_list: training samples per class, n_j >= 1, length C >= 2; see `ldam_margins`.
        min_count: as in `ldam_margins`.

    Returns:
        The weights, shape (C,), in torch's default dtype, on the CPU.

    Raises:
        TypeError, ValueError: a count below 1 (the message names the class), or fewer than two classes.
    """
    counts = checked_counts(cls_num_list, min_count)
    if len(counts) < 2:
        raise ValueError(f"inverse_frequency_weights needs at least 2 classes in cls_num_list, got {len(counts)}")
    return ((1.0 - counts / counts.sum()) / (len(counts) - 1)).to(torch.get_default_dtype())


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
