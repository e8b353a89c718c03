"""What the loss and its gradient must be, written from the specification and sharing nothing with the package.

A row with moderate odds is the textbook composite in float64, differentiated by autograd:
`F.cross_entropy` on margin-shifted, scaled logits for LDAM and `-(1 - p)^gamma log p` for focal loss.
A row on which that composite loses digits (confident, far apart or far from zero) is evaluated with mpmath
from the odds against the target, `x = sum_{j != y} exp(z_j - z_y)`. Rows with special values follow the edges of the
specification in their order of precedence, and the two terms are reduced each in its own way.

    loss, grad = expected(logits, target, s=1.0, reduction="sum", grad_output=torch.tensor(2.0))

takes the options of `lmf_loss` (all but `backend`) and returns float64 tensors: the loss, and the gradient in
the logits' shape.
"""

from __future__ import annotations

from typing import NamedTuple

import mpmath
import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS = 50
# Beyond these the float64 composite is no longer good to 1e-11: at odds of e^-5 it has lost two digits, and
# s * z is rounded before the common offset cancels.
CONFIDENT = -5.0
LARGE = 1e3

Number = float | Tensor


class Terms(NamedTuple):
    """Both terms of each row before weights, coefficients and reduction; gradients are with respect to the row."""

    ldam: Tensor  # (R,)
    focal: Tensor  # (R,)
    d_ldam: Tensor  # (R, C)
    d_focal: Tensor  # (R, C)


def expected(
    logits: Tensor,
    target: Tensor,
    *,
    margins: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.5,
    s: float = 30.0,
    weight: Tensor | None = None,
    ldam_weight: Tensor | None = None,
    focal_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Number | tuple[Number, Number] | None = None,
    grad_output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the float64 loss and gradient of the LMF loss.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk), any dtype and strides; read exactly as they are.
        target: class indices, () or (N, d1, ..., dk). A label outside [0, C) that is not ignored makes
            its row NaN (backends that raise instead are not asked for a number).
        margins: (C,), zeros by default.
        alpha, beta, gamma, s: coefficient of LDAM, of focal loss, focal exponent, LDAM scale.
        weight, ldam_weight, focal_weight: (C,); `weight` stands for the other two.
        ignore_index: label of rows that count for nothing.
        reduction: "none", "mean" or "sum".
        normalizer: replaces the denominators of "mean": one number or the pair (LDAM, focal).
        grad_output: 0-dim, or in the target's shape for "none"; ones by default.
    """
    rows, labels = _rows(logits), target.detach().reshape(-1).long()
    count, classes = rows.shape
    kept = labels != ignore_index
    bad = kept & ((labels < 0) | (labels >= classes))
    valid = kept & ~bad
    terms = _all_terms(rows, labels, valid, _vector(margins, classes, 0.0), gamma, s)

    if weight is not None:
        ldam_weight = focal_weight = weight
    row_ldam = _row_weights(ldam_weight, labels, valid, classes)
    row_focal = _row_weights(focal_weight, labels, valid, classes)
    denominators: tuple[Number, Number] = (1.0, 1.0)
    if reduction == "mean":
        denominators = (row_ldam.sum(), kept.sum().double())
        if normalizer is not None:
            denominators = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)

    outer = torch.ones((), dtype=torch.float64) if grad_output is None else grad_output.detach().double()
    outer = outer.reshape(-1).expand(count)
    loss = torch.zeros(count if reduction == "none" else (), dtype=torch.float64)
    grad = torch.zeros_like(rows)
    for coefficient, weights, values, slopes, denominator in (
        (alpha, row_ldam, terms.ldam, terms.d_ldam, denominators[0]),
        (beta, row_focal, terms.focal, terms.d_focal, denominators[1]),
    ):
        if coefficient == 0:  # the term is not evaluated at all
            continue
        factor = coefficient * weights
        live = factor != 0  # a zero weight hides whatever the row holds
        value = torch.where(live, factor * values, 0.0).masked_fill(bad, torch.nan)
        slope = torch.where(live[:, None], factor[:, None] * slopes, 0.0).masked_fill(bad[:, None], torch.nan)
        loss = loss + (value if reduction == "none" else value.sum() / denominator)
        moving = (slope != 0).any(1, keepdim=True)  # no 0 * inf where nothing moves; NaN != 0 holds
        grad = grad + torch.where(moving, (outer / denominator)[:, None] * slope, 0.0)
    return loss.reshape(target.shape if reduction == "none" else ()), _unrows(grad, logits)


def _rows(logits: Tensor) -> Tensor:
    """(N, C, d1, ..., dk) to float64 (N * d1 * ... * dk, C), rows in the target's order."""
    z = logits.detach().double()
    z = z if z.dim() == 1 else z.movedim(1, -1)
    return z.reshape(z.numel() // max(z.shape[-1], 1), z.shape[-1])


def _unrows(rows: Tensor, logits: Tensor) -> Tensor:
    if logits.dim() == 1:
        return rows.reshape(logits.shape)
    shape = (logits.shape[0], *logits.shape[2:], logits.shape[1])
    return rows.reshape(shape).movedim(-1, 1)


def _vector(values: Tensor | None, classes: int, default: float) -> Tensor:
    if values is None:
        return torch.full((classes,), default, dtype=torch.float64)
    return values.detach().double()


def _row_weights(weight: Tensor | None, labels: Tensor, valid: Tensor, classes: int) -> Tensor:
    """The class weight of each row's label, 0 for ignored rows and bad labels."""
    return torch.where(valid, _vector(weight, classes, 1.0)[labels.where(valid, 0)], 0.0)


def _all_terms(rows: Tensor, labels: Tensor, valid: Tensor, margins: Tensor, gamma: float, s: float) -> Terms:
    zeros = rows.new_zeros(rows.shape[0])
    terms = Terms(zeros, zeros.clone(), torch.zeros_like(rows), torch.zeros_like(rows))
    easy = valid & _composite_is_accurate(rows, labels.where(valid, 0), margins, s)
    if easy.any():
        for total, part in zip(terms, composite(rows[easy], labels[easy], margins, gamma, s), strict=True):
            total[easy] = part
    for i in (valid & ~easy).nonzero().flatten().tolist():
        y = int(labels[i])
        row = edge(rows[i], y, s) or exact(rows[i].tolist(), y, float(margins[y]), gamma, s)
        for total, part in zip(terms, row, strict=True):
            total[i] = part
    return terms


def _composite_is_accurate(rows: Tensor, labels: Tensor, margins: Tensor, s: float) -> Tensor:
    own = rows.gather(1, labels[:, None])
    others = rows.scatter(1, labels[:, None], -torch.inf)
    a = (others - own).logsumexp(1)
    b = (s * (others - own + margins[labels][:, None])).logsumexp(1)
    return (torch.minimum(a, b) > CONFIDENT) & (rows.abs().amax(1) * max(s, 1.0) < LARGE)


def composite(rows: Tensor, labels: Tensor, margins: Tensor, gamma: float, s: float) -> Terms:
    """The textbook formulas on (R, C) float64 rows, differentiated by autograd."""
    z = rows.detach().requires_grad_()
    shift = F.one_hot(labels, rows.shape[1]) * margins
    ldam = F.cross_entropy(s * (z - shift), labels, reduction="none")
    log_p = F.log_softmax(z, 1).gather(1, labels[:, None]).squeeze(1)
    focal = -((1 - log_p.exp()) ** gamma) * log_p
    (d_ldam,) = torch.autograd.grad(ldam.sum(), z)
    (d_focal,) = torch.autograd.grad(focal.sum(), z)
    return Terms(ldam.detach(), focal.detach(), d_ldam, d_focal)


def edge(row: Tensor, y: int, s: float) -> Terms | None:
    """A row whose value is a convention or a limit rather than a formula; None for any other row."""
    others = torch.cat([row[:y], row[y + 1 :]])
    infinite, nothing = torch.tensor(torch.inf), torch.zeros_like(row)
    no_competitor = bool((others == -torch.inf).all())
    if row.isnan().any() or (row == torch.inf).any() or (no_competitor and row[y] == -torch.inf):
        return Terms(infinite * 0, infinite * 0, nothing + torch.nan, nothing + torch.nan)
    if no_competitor:
        return Terms(torch.tensor(0.0), torch.tensor(0.0), nothing, nothing)
    if row[y] == -torch.inf:
        # Both losses grow like the log-odds: slope 1 (s for LDAM), shared among the competitors by their softmax.
        target = F.one_hot(torch.tensor(y), row.numel())
        return Terms(infinite, infinite, s * ((s * row).softmax(0) - target), row.softmax(0) - target)
    return None


def exact(row: list[float], y: int, margin: float, gamma: float, s: float) -> Terms:
    """One row in mpmath; competitors at -inf have no odds.

    LDAM is log(1 + u) with u = sum exp(s (z_j - z_y + D_y)); focal loss is F(x) = (x / (1 + x))^gamma log(1 + x)
    with x = sum exp(z_j - z_y).
    """
    with mpmath.workdps(DIGITS):
        gaps = [None if j == y or z == -mpmath.inf else mpmath.mpf(z) - row[y] for j, z in enumerate(row)]
        odds = [mpmath.mpf(0) if gap is None else mpmath.exp(gap) for gap in gaps]
        scaled = [mpmath.mpf(0) if gap is None else mpmath.exp(s * (gap + margin)) for gap in gaps]
        x, u = mpmath.fsum(odds), mpmath.fsum(scaled)
        nll, miss = mpmath.log1p(x), x / (1 + x)
        slope_x = gamma * miss ** (gamma - 1) / (1 + x) ** 2 * nll + miss**gamma / (1 + x)
        slope_u = s / (1 + u)
        d_ldam = [float(slope_u * v) for v in scaled]
        d_focal = [float(slope_x * v) for v in odds]
        d_ldam[y], d_focal[y] = float(-slope_u * u), float(-slope_x * x)
        ldam, focal = float(mpmath.log1p(u)), float(miss**gamma * nll)
    return Terms(*(torch.tensor(part, dtype=torch.float64) for part in (ldam, focal, d_ldam, d_focal)))
