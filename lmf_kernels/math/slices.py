"""Rows of which no one holds all classes, because these come in chunks or are spread over ranks, in eager PyTorch.

Every slice of the classes gives the sums (4, rows) = m, t1, t2, z_y of eq. 1 over its own competitors (z_y = 0 where it
does not hold the target); `combine` or an all-reduce joins them. `finish` is eq. 2 to 7 on whole rows and `backward_`
eq. 8 on a slice. With one exponential (alpha = 0, beta = 0 or s = 1) t1 and t2 are the same sum, with the exponent of
the one term.
"""

import math

import torch
from torch import Tensor

from .._call import MEAN, NONE, Options, Tables
from .rows import (
    Labels,
    RowTables,
    accumulation_dtype,
    denominators,
    focal_log_odds,
    focal_slope,
    focal_term,
    ldam_log_odds,
    ldam_term,
    look_up,
    or_zero,
    read_labels,
    reduce,
    weighted,
)


def scales(options: Options) -> tuple[float, float]:
    """The factors of the exponents in t1 and t2."""
    return options.s if options.beta == 0 else 1.0, 1.0 if options.alpha == 0 else options.s


def slice_sums(
    logits: Tensor,  # (N, C, ...)
    target: Tensor,  # (N, ...)
    first_class: int,
    options: Options,
) -> Tensor:
    """Eq. 1 over the classes [first_class, first_class + C)."""
    z = _rows(logits).to(accumulation_dtype(logits.dtype), copy=True)
    y, here = _local_labels(target, first_class, z.shape[1], options.ignore_index)
    z_y = torch.where(here, z.gather(1, y[:, None]).squeeze(1), 0.0)
    z.scatter_(1, y[:, None], torch.where(here, -math.inf, z.gather(1, y[:, None]).squeeze(1))[:, None])
    m = z.amax(1)
    scale_1, scale_2 = scales(options)
    d = z.sub_(or_zero(m)[:, None])
    t1 = (d * scale_1).exp_().sum(1)
    t2 = t1 if scale_1 == scale_2 else d.mul_(scale_2).exp_().sum(1)
    return torch.stack((m, t1, t2, z_y))


def no_sums(rows: int, like: Tensor) -> Tensor:
    """The sums (4, rows) over no classes."""
    sums = torch.zeros((4, rows), dtype=accumulation_dtype(like.dtype), device=like.device)
    sums[0] = -math.inf
    return sums


def relative_to(m: Tensor, sums: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """t1, t2, z_y with the sums relative to m, which is at least their own maximum."""
    own, t1, t2, z_y = sums.unbind()
    change = torch.where(own == m, 0.0, own - m)
    scale_1, scale_2 = scales(options)
    return t1 * (change * scale_1).exp(), t2 * (change * scale_2).exp(), z_y


def combine(one: Tensor, other: Tensor, options: Options) -> Tensor:
    """The sums over two slices together."""
    m = torch.maximum(one[0], other[0])
    parts = zip(relative_to(m, one, options), relative_to(m, other, options), strict=True)
    return torch.stack((m, *(a + b for a, b in parts)))


def finish(
    sums: Tensor,  # (4, rows)
    labels: Labels,  # (...), of as many elements as rows
    rows: RowTables,  # likewise
    tables: Tables,  # of which the normalizers are read
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 2 to 7 and the edges: (loss, saved (5, rows) = m, c1, c2, g1, g2, denominators), as the forward ops."""
    alpha, beta, gamma, s, _, reduction = options
    m, t1, t2, z_y = sums.view(4, *labels.y.shape)
    gap = m - z_y
    poison = labels.bad | gap.isnan() | t1.isnan() | t2.isnan() | (z_y == math.inf)
    gap, t1, t2 = (torch.where(poison, math.nan, value) for value in (gap, t1, t2))
    zero = torch.zeros_like(m)
    c1 = c2 = g1 = g2 = zero
    ldam = focal = None

    def over(g: Tensor, t: Tensor) -> Tensor:
        return torch.where(g == 0, 0.0, g / t)

    if beta != 0:
        odds = focal_log_odds(gap, t1, rows, labels)
        focal = focal_term(odds, gamma)
        g1 = weighted(odds, beta * focal_slope(odds.x, gamma))
        c1 = over(g1, t1)
    if alpha != 0:
        odds = ldam_log_odds(gap, t2, rows, labels, s)
        ldam = ldam_term(odds)
        g2 = weighted(odds, alpha * s * torch.sigmoid(odds.x))
        c2 = over(g2, t2)
    saved = torch.stack((or_zero(m), c1, c2, g1, g2)).view(5, -1)
    both = denominators(labels, rows.w_ldam, tables, m.dtype) if reduction == MEAN else None
    if ldam is None and focal is None:
        loss = zero if reduction == NONE else zero.sum()
    else:
        loss = reduce(ldam, focal, both, options)
    return loss, saved, m.new_empty(0) if both is None else torch.stack(both)


def forward(logits: Tensor, target: Tensor, tables: Tables, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op on whole rows."""
    sums = slice_sums(logits, target, 0, options)
    labels = read_labels(target, logits.shape[1], options.ignore_index)
    return finish(sums, labels, look_up(tables, labels.y, sums.dtype), tables, options)


def backward_(
    grad_output: Tensor,
    logits: Tensor,  # (N, C, ...), overwritten
    target: Tensor,  # (N, ...), counted from the slice's first class
    saved: Tensor,  # (5, rows)
    denominators: Tensor,
    options: Options,
) -> None:
    """Eq. 8 over a slice of the classes, written over its logits."""
    m, c1, c2, g1, g2 = saved.unbind()
    r1 = r2 = grad_output.reshape(-1).to(m.dtype)
    if options.reduction == MEAN:
        r2, r1 = r1 / denominators[0], r1 / denominators[1]
    rc1, g1 = (torch.where(c1 == 0, 0.0, r1 * value) for value in (c1, g1))
    rc2, g2 = (torch.where(c2 == 0, 0.0, r2 * value) for value in (c2, g2))
    live = (rc1 != 0) | (rc2 != 0)
    z = _rows(logits).to(m.dtype, copy=True)
    d = z.masked_fill_(~live[:, None], 0.0).sub_(m[:, None])
    scale_1, scale_2 = scales(options)
    if scale_1 == scale_2:
        grad = d.mul_(scale_1).exp_().mul_((rc1 + rc2)[:, None])
    else:
        grad = (d * scale_1).exp_().mul_(rc1[:, None])
        grad += d.mul_(scale_2).exp_().mul_(rc2[:, None])
    y, here = _local_labels(target, 0, z.shape[1], None)
    grad_y = torch.where(here, -(g1 + g2), grad.gather(1, y[:, None]).squeeze(1))
    grad.scatter_(1, y[:, None], grad_y[:, None])
    grad.masked_fill_(~live[:, None], 0.0)
    rows = logits.movedim(1, -1)
    rows.copy_(grad.reshape(rows.shape))


def backward(
    grad_output: Tensor, logits: Tensor, target: Tensor, saved: Tensor, denominators: Tensor, options: Options
) -> Tensor:
    """The same beside the logits."""
    grad_logits = logits.detach().clone()
    backward_(grad_output, grad_logits, target, saved, denominators, options)
    return grad_logits


def _rows(logits: Tensor) -> Tensor:
    """(N, C, d...) as (rows, C) in the target's order."""
    return logits if logits.dim() == 2 else logits.movedim(1, -1).reshape(-1, logits.shape[1])


def _local_labels(target: Tensor, first_class: int, classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Labels counted from first_class, 0 where they are not in the slice, and whether they are."""
    y = target.reshape(-1) - first_class
    here = (y >= 0) & (y < classes)
    if ignore_index is not None:
        here &= target.reshape(-1) != ignore_index
    return torch.where(here, y, 0), here
