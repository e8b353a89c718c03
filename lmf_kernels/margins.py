"""From labels to class counts, and from class counts to margins and class weights."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import as_float, check_dense, check_memory


def class_counts(labels: Any, num_classes: int) -> Tensor:
    """Counts the samples of each class: n_j = #{i : labels[i] = j}.

    Args:
        labels: class indices as a tensor, array, list, or a dataset that holds them as `.targets`.
        num_classes: C, at least 1; classes without a sample count 0.

    Returns:
        The counts, shape (C,), int64, on the CPU.

    Raises:
        TypeError: the labels are not integers, or `num_classes` is not one.
        ValueError: a label lies outside [0, C), or `num_classes` outside [1, 2^31).
    """
    if not isinstance(num_classes, numbers.Integral):
        raise TypeError(f"num_classes must be an integer, got {type(num_classes).__name__}")
    if not 1 <= num_classes < 2**31:
        raise ValueError(f"num_classes must be at least 1 and below 2^31, got {num_classes}")
    labels = _dense("labels", getattr(labels, "targets", labels), "integer class indices")
    if labels.numel() == 0:
        return torch.zeros(num_classes, dtype=torch.int64)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer class indices, got dtype {labels.dtype}")
    labels = labels.reshape(-1).long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}) for num_classes={num_classes}, got {low if low < 0 else high}"
        )
    return torch.bincount(labels, minlength=num_classes)


def ldam_margins(cls_num_list: Sequence[int] | Tensor, max_m: float = 0.5) -> Tensor:
    """LDAM's label-distribution-aware margins: D_j = max_m * n_j^(-1/4) / max_k n_k^(-1/4).

    The rarest class gets the margin `max_m`. Source: Cao et al. 2019, "Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss", arXiv 1906.07413.

    Args:
        cls_num_list: training samples per class, n_j >= 1, shape (C,).
        max_m: the largest margin, in units of logits, finite.

    Returns:
        The margins, shape (C,), in torch's default dtype.

    Raises:
        TypeError, ValueError: a count is not a number of at least 1 (the message names the class), or `max_m` not a
            finite number.
    """
    check_max_m(max_m)
    counts = checked_counts(cls_num_list)
    return margins_from_rarest(counts, counts.min(), max_m)


def margins_from_rarest(counts: Tensor, rarest: Tensor, max_m: float) -> Tensor:
    """The margins of classes that need not be all of them; `rarest` is the smallest count of all."""
    return (float(max_m) * counts**-0.25 / rarest**-0.25).to(torch.get_default_dtype())


def check_max_m(max_m: float) -> None:
    _check_number("max_m", max_m)
    if not math.isfinite(as_float(max_m)):
        raise ValueError(f"max_m must be finite, got {max_m}")


def effective_number_weights(cls_num_list: Sequence[int] | Tensor, beta: float = 0.9999) -> Tensor:
    """Class-balanced weights from effective numbers: w_j ~ (1 - beta) / (1 - beta^n_j), with sum C.

    Source: Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", arXiv 1901.05555; LDAM-DRW
    applies them late in training. beta = 0 gives ones.

    Args:
        cls_num_list: training samples per class, n_j >= 1, shape (C,).
        beta: in [0, 1).

    Returns:
        The weights, shape (C,), in torch's default dtype.

    Raises:
        TypeError, ValueError: a count below 1 (the message names the class), or `beta` outside [0, 1).
    """
    _check_number("beta", beta)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    counts = checked_counts(cls_num_list)
    if beta == 0:
        return torch.ones(len(counts))
    # 1 - beta^n without cancellation for beta near 1.
    weights = 1.0 / -torch.expm1(counts * math.log(beta))
    return (weights * (len(weights) / weights.sum())).to(torch.get_default_dtype())


def inverse_frequency_weights(cls_num_list: Sequence[int] | Tensor) -> Tensor:
    """Weights that fall linearly with the class frequency: w_j = (1 - n_j / sum_k n_k) / (C - 1), with sum 1.

    Source: the weighted cross-entropy of the LMF paper's official code.

    Args:
        cls_num_list: training samples per class, n_j >= 1, shape (C,), C >= 2.

    Returns:
        The weights, shape (C,), in torch's default dtype.

    Raises:
        TypeError, ValueError: a count below 1 (the message names the class), or fewer than two classes.
    """
    counts = checked_counts(cls_num_list)
    if len(counts) < 2:
        raise ValueError(f"inverse_frequency_weights needs at least 2 classes in cls_num_list, got {len(counts)}")
    return ((1.0 - counts / counts.sum()) / (len(counts) - 1)).to(torch.get_default_dtype())


def checked_counts(cls_num_list: Sequence[int] | Tensor) -> Tensor:
    """The checked counts as a float64 CPU tensor, (C,)."""
    counts = _dense("cls_num_list", cls_num_list, "a sequence of class counts")
    if counts.is_complex():
        raise TypeError(f"cls_num_list must hold real counts, got dtype {counts.dtype}")
    counts = counts.to(torch.float64)
    if counts.dim() != 1 or len(counts) == 0:
        raise ValueError(f"cls_num_list must hold one count a class, shape (C,), got shape {tuple(counts.shape)}")
    for index, count in enumerate(counts.tolist()):
        if not 1 <= count < float("inf"):
            raise ValueError(f"cls_num_list must hold counts >= 1, got {count:g} for class {index}")
    return counts


def _dense(name: str, values: Any, expected: str) -> Tensor:
    """`values` as a tensor in the CPU's memory."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be {expected}, got {type(values).__name__} ({error})") from error
    check_dense(name, tensor)
    if tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"{name} must be {expected}, got a {'meta' if tensor.is_meta else 'quantized'} tensor")
    check_memory(name, tensor)
    return tensor.detach().cpu()


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
