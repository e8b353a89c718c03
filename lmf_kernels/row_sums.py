"""The loss from sums of rows over slices of their classes, in eager PyTorch with reference.py's equations.

Where no one holds a whole row, because its classes come in chunks or are spread over ranks, every slice gives the
sums (4, rows) = m, t1, t2, z_y of eq. 1 over its own competitors (z_y = 0 where it does not hold the target), and
`combine` or an all-reduce joins them. `finish` is eq. 2 to 7 on whole rows and `backward_` eq. 8 on a slice.

With one exponential (alpha = 0, beta = 0 or s = 1) t1 and t2 are the same sum, with the exponent of the one term.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import MEAN, NONE, softplus


class Hyper(NamedTuple):
    """The options that the mathematics of a row depends on."""

    alpha: float
    beta: float
    gamma: float
    s: float

    @property
    def scales(self) -> tuple[float, float]:
        """The factors of the exponents in t1 and t2."""
        return self.s if self.beta == 0 else 1.0, 1.0 if self.alpha == 0 else self.s


class RowTables(NamedTuple):
    """What a row needs to know of its own class, each (rows,) or None for the default."""

    margin: Tensor | None
    w_ldam: Tensor | None
    w_focal: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def slice_sums(
    logits: Tensor,  # (N, C, ...)
    target: Tensor,  # (N, ...)
    first_class: int,
    alpha: float,
    beta: float,
    gamma: float,
    s: float,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """Eq. 1 over the classes [first_class, first_class + C): the eager version of the `<backend>_sums` ops."""
    z = _rows(logits).to(accumulation_dtype(logits.dtype), copy=True)
    y, here = _local_labels(target, first_class, z.shape[1], ignore_index)
    z_y = torch.where(here, z.gather(1, y[:, None]).squeeze(1), 0.0)
    z.scatter_(1, y[:, None], torch.where(here, -math.inf, z.gather(1, y[:, None]).squeeze(1))[:, None])
    m = z.amax(1)
    scale_1, scale_2 = Hyper(alpha, beta, gamma, s).scales
    d = z.sub_(torch.where(m == -math.inf, 0.0, m)[:, None])
    t1 = (d * scale_1).exp_().sum(1)
    t2 = t1 if scale_1 == scale_2 else d.mul_(scale_2).exp_().sum(1)
    return torch.stack((m, t1, t2, z_y))


def no_sums(rows: int, like: Tensor) -> Tensor:
    """The sums (4, rows) of no classes."""
    sums = torch.zeros((4, rows), dtype=accumulation_dtype(like.dtype), device=like.device)
    sums[0] = -math.inf
    return sums


def relative_to(m: Tensor, sums: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor, Tensor]:
    """t1, t2, z_y with the sums relative to m, which is at least the sums' own maximum."""
    own, t1, t2, z_y = sums.unbind()
    change = torch.where(own == m, 0.0, own - m)
    scale_1, scale_2 = hyper.scales
    return t1 * (change * scale_1).exp(), t2 * (change * scale_2).exp(), z_y


def combine(one: Tensor, other: Tensor, hyper: Hyper) -> Tensor:
    """The sums of two slices together."""
    m = torch.maximum(one[0], other[0])
    sums = zip(relative_to(m, one, hyper), relative_to(m, other, hyper), strict=True)
    return torch.stack((m, *(a + b for a, b in sums)))


def finish(
    sums: Tensor,  # (4, rows)
    target: Tensor,  # (...), with as many elements as rows
    num_classes: int,
    tables: RowTables,
    ldam_normalizer: Tensor | None,
    focal_normalizer: Tensor | None,
    hyper: Hyper,
    ignore_index: int,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 2 to 7 and the edges: (loss, saved (5, rows) = m, c1, c2, g1, g2, denominators), as the forward ops."""
    alpha, beta, gamma, s = hyper
    m, t1, t2, z_y = sums.unbind()
    y = target.reshape(-1)
    kept = y != ignore_index
    valid = kept & (y >= 0) & (y < num_classes)
    gap = m - z_y
    poison = gap.isnan() | t1.isnan() | t2.isnan() | (z_y == math.inf)
    zero = torch.zeros_like(m)
    one = torch.ones_like(m)

    def weighted(value: Tensor, w: Tensor) -> Tensor:
        value = torch.where(w == 0, 0.0, w * torch.where(poison, math.nan, value))
        return torch.where(valid, value, torch.where(kept, math.nan, 0.0))

    ldam = focal = c1 = c2 = g1 = g2 = zero
    w_ldam = one if tables.w_ldam is None else tables.w_ldam
    if beta != 0:
        w_focal = one if tables.w_focal is None else tables.w_focal
        a = (gap + t1.log()).clamp_min(-1e30)  # edge 5: loss and slope become 0, without 0 * inf
        power = torch.exp(-gamma * softplus(-a))
        softplus_a = softplus(a)
        slope = torch.sigmoid(a) + gamma * torch.sigmoid(-a) * softplus_a
        slope = torch.where(a == math.inf, 1.0, slope)  # edge 6
        focal = weighted(power * softplus_a, w_focal)
        g1 = weighted(beta * (power * slope), w_focal)
        c1 = torch.where(g1 == 0, 0.0, g1 / t1)
    if alpha != 0:
        shifted = gap if tables.margin is None else gap + tables.margin
        b = (s * shifted + t2.log()).clamp_min(-1e30)
        ldam = weighted(softplus(b), w_ldam)
        g2 = weighted(alpha * s * torch.sigmoid(b), w_ldam)
        c2 = torch.where(g2 == 0, 0.0, g2 / t2)
    saved = torch.stack((torch.where(m == -math.inf, 0.0, m), c1, c2, g1, g2))
    if reduction == NONE:
        return (alpha * ldam + beta * focal).reshape(target.shape), saved, m.new_empty(0)
    sum_ldam, sum_focal, denominators = ldam.sum(), focal.sum(), m.new_empty(0)
    if reduction == MEAN:
        denominators = torch.stack(
            (
                (w_ldam * valid).sum() if ldam_normalizer is None else ldam_normalizer.to(m.dtype),
                kept.sum().to(m.dtype) if focal_normalizer is None else focal_normalizer.to(m.dtype),
            )
        )
        sum_ldam, sum_focal = sum_ldam / denominators[0], sum_focal / denominators[1]
    loss = m.new_zeros(())
    if alpha != 0:
        loss = loss + alpha * sum_ldam
    if beta != 0:
        loss = loss + beta * sum_focal
    return loss, saved, denominators


def backward_(
    grad_output: Tensor,
    logits: Tensor,  # (N, C, ...), overwritten
    target: Tensor,  # (N, ...), counted from the slice's first class
    saved: Tensor,
    denominators: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
    s: float,
    ignore_index: int,
    reduction: int,
) -> None:
    """Eq. 8 over a slice of the classes: the eager version of the `<backend>_backward_` ops."""
    m, c1, c2, g1, g2 = saved.unbind()
    r1 = r2 = grad_output.reshape(-1).to(m.dtype)
    if denominators.numel():
        r2, r1 = r1 / denominators[0], r1 / denominators[1]
    rc1, g1 = (torch.where(c1 == 0, 0.0, r1 * value) for value in (c1, g1))
    rc2, g2 = (torch.where(c2 == 0, 0.0, r2 * value) for value in (c2, g2))
    live = (rc1 != 0) | (rc2 != 0)
    z = _rows(logits).to(m.dtype, copy=True)
    d = z.masked_fill_(~live[:, None], 0.0).sub_(m[:, None])
    scale_1, scale_2 = Hyper(alpha, beta, gamma, s).scales
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
