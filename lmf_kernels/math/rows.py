"""What the sums of a row tell, in eager PyTorch: eq. 2 to 6 and the edges of reference.py, and the reductions.

Differentiable to any order. Everything about a row has the shape of the target.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from .._call import NONE, Options, Tables

# Looked up once, at import: torch.compile cannot trace the looking before torch 2.13.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu", "privateuseone") if is_autocast_available(name)
)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, operations on tensors of this device type keep their dtypes."""
    if device_type in AUTOCAST_DEVICES:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Labels(NamedTuple):
    kept: Tensor  # not ignore_index
    valid: Tensor  # kept, and a class
    y: Tensor  # the class, 0 where it is not valid
    bad: Tensor  # kept, and no class


def read_labels(target: Tensor, num_classes: int, ignore_index: int) -> Labels:
    kept = target != ignore_index
    valid = kept & (target >= 0) & (target < num_classes)
    return Labels(kept, valid, torch.where(valid, target, 0), kept & ~valid)


class RowTables(NamedTuple):
    """What a row needs to know of its own class; None is the default of the table."""

    margin: Tensor | None
    w_ldam: Tensor | None
    w_focal: Tensor | None


def is_live(rows: RowTables, alpha: float, beta: float) -> Tensor | bool:
    """Whether a term is evaluated whose class weight is not 0."""
    ldam = alpha != 0 if rows.w_ldam is None else (rows.w_ldam != 0) & (alpha != 0)
    focal = beta != 0 if rows.w_focal is None else (rows.w_focal != 0) & (beta != 0)
    return ldam | focal


def look_up(tables: Tables, y: Tensor, acc: torch.dtype) -> RowTables:
    by_class = tables.margins, tables.ldam_weight, tables.focal_weight
    return RowTables(*(None if table is None else table.to(acc)[y] for table in by_class))


def or_zero(m: Tensor) -> Tensor:
    """What exponents are relative to: m, but 0 where nothing is finite, so that exp(-inf - 0) = 0 and not NaN."""
    return torch.where(m == -math.inf, 0.0, m)


# ---- eq. 2 to 6 -----------------------------------------------------------------------------------------------------
def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), accurate relative to its value, as are its first and second derivatives."""
    positive = x > 0
    # torch.where, not abs and clamp: their derivatives at x = 0 (all logits equal) would not add up to 1/2.
    return torch.where(positive, x, 0.0) + torch.log1p(torch.exp(torch.where(positive, -x, x)))


def modulation(a: Tensor, gamma: float) -> Tensor:
    """sigmoid(a)^gamma by eq. 4."""
    return torch.exp(-gamma * softplus(-a))


def focal_value(a: Tensor, gamma: float) -> Tensor:
    """Eq. 3; beyond a = 1e4, where exp(-a) = 0, `a` itself: no 0 * inf in its derivatives (edge 6)."""
    saturated = a > 1e4
    moderate = torch.where(saturated, 0.0, a)
    return torch.where(saturated, a, modulation(moderate, gamma) * softplus(moderate))


def focal_slope(a: Tensor, gamma: float) -> Tensor:
    """Eq. 5; 1 at a = inf (edge 6)."""
    slope = torch.sigmoid(a) + gamma * torch.sigmoid(-a) * softplus(a)
    return modulation(a, gamma) * torch.where(a == math.inf, 1.0, slope)


class LogOdds(NamedTuple):
    x: Tensor  # a or b of eq. 2
    silent: Tensor  # rows whose term is a stored zero: edges 1, 3 and 5
    weight: Tensor | None  # of the row's class


def _log_odds(gap: Tensor, t: Tensor, weight: Tensor | None, labels: Labels) -> LogOdds:
    """Of one term: gap = m - z_y, scaled and with its margin, and NaN, as t, where the row is poisoned."""
    alone = t == 0
    x = gap + torch.where(alone, 1.0, t).log()
    x = torch.where(x < -1e30, -1e30, x)  # not -inf: no gamma * inf for gamma = 0
    silent = alone | ~labels.kept
    if weight is not None:
        silent = silent | ((weight == 0) & labels.valid)
    return LogOdds(x, silent, weight)


def focal_log_odds(gap: Tensor, t1: Tensor, rows: RowTables, labels: Labels) -> LogOdds:
    """a of eq. 2."""
    return _log_odds(gap, t1, rows.w_focal, labels)


def ldam_log_odds(gap: Tensor, t2: Tensor, rows: RowTables, labels: Labels, s: float) -> LogOdds:
    """b of eq. 2."""
    return _log_odds(s * (gap if rows.margin is None else gap + rows.margin), t2, rows.w_ldam, labels)


def weighted(odds: LogOdds, value: Tensor) -> Tensor:
    """A term's value or slope times the class weight, with the edges; NaN where x is NaN."""
    return torch.where(odds.silent, 0.0, value if odds.weight is None else odds.weight * value)


def focal_term(odds: LogOdds, gamma: float) -> Tensor:
    """The weighted focal term of each row by eq. 3."""
    return weighted(odds, focal_value(odds.x, gamma))


def ldam_term(odds: LogOdds) -> Tensor:
    """The weighted LDAM term of each row by eq. 3."""
    return weighted(odds, softplus(odds.x))


# ---- the reductions -------------------------------------------------------------------------------------------------
def denominators(labels: Labels, w_ldam: Tensor | None, tables: Tables, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """What 'mean' divides the LDAM sum and the focal sum by: w_ldam of all valid rows, the number of kept rows."""
    ldam, focal = tables.ldam_normalizer, tables.focal_normalizer
    if ldam is None:
        weights = labels.valid if w_ldam is None else torch.where(labels.valid, w_ldam, 0.0)
        ldam = weights.sum(dtype=acc)
    if focal is None:
        focal = labels.kept.sum(dtype=acc)
    return ldam.to(acc), focal.to(acc)


def reduce(ldam: Tensor | None, focal: Tensor | None, over: tuple[Tensor, Tensor] | None, options: Options) -> Tensor:
    """The loss from the weighted terms of rows, of which one may be None; `over` are the denominators of 'mean'."""
    reduced = []
    for i, (coefficient, term) in enumerate(((options.alpha, ldam), (options.beta, focal))):
        if term is None:
            continue
        if options.reduction != NONE:
            term = term.sum()
        reduced.append(coefficient * (term if over is None else term / over[i]))
    return reduced[0] + reduced[1] if len(reduced) == 2 else reduced[0]
