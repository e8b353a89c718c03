"""The mathematics of the LMF loss, derived once, and differentiable eager PyTorch in the same form.

The LMF loss (Large Margin aware Focal loss, arXiv 2212.12741) is

    L_LMF = alpha * L_LDAM + beta * L_focal                                              (paper, eq. 3)

For one row of logits z with target y, margin D = margins[y] and scale s, the paper and LDAM-DRW define

    p_y     = exp(z_y) / sum_j exp(z_j)
    L_focal = (1 - p_y)^gamma * (-log p_y)
    L_LDAM  = -log( exp(s (z_y - D)) / (exp(s (z_y - D)) + sum_{j != y} exp(s z_j)) )

**Log-odds form.** Divide numerator and denominator by the target's exponential, and let m be the largest
competitor:

    m  = max_{j != y} z_j
    T1 = sum_{j != y} exp(z_j - m)                T2 = sum_{j != y} exp(s (z_j - m))              (eq. 1)
    a  = (m - z_y) + log T1                       b  = s ((m - z_y) + D) + log T2                 (eq. 2)
    p_y = 1 / (1 + exp(a)),  hence  1 - p_y = sigmoid(a)  and  -log p_y = softplus(a)
    focal = sigmoid(a)^gamma * softplus(a)        ldam = softplus(b)                              (eq. 3)
    sigmoid(a)^gamma = exp(-gamma * softplus(-a))                                                 (eq. 4)

Nothing is ever computed as 1 - p, so confident rows (a << 0) keep their relative precision. T1 and T2 lie in
[1, C - 1]: no overflow and no cancellation, whatever the common offset of the logits.

**Gradient.** With d a / d z_j = exp(z_j - m) / T1 and d b / d z_j = s exp(s (z_j - m)) / T2 for j != y, and the
negated sums of these for the target,

    d focal / da = sigmoid(a)^gamma * (sigmoid(a) + gamma * sigmoid(-a) * softplus(a))            (eq. 5)
    d ldam  / db = sigmoid(b)                                                                     (eq. 6)
    c1 = beta  * w_focal[y] * (d focal / da) / T1         g1 = c1 * T1
    c2 = alpha * w_ldam[y]  * s * (d ldam / db) / T2      g2 = c2 * T2                            (eq. 7)
    dL/dz_j = r1 c1 exp(z_j - m) + r2 c2 exp(s (z_j - m))      j != y
    dL/dz_y = -(r1 g1 + r2 g2)                                                                    (eq. 8)

r1 and r2 are grad_output over the denominators of the focal and of the LDAM mean. The kernels save
(m, c1, c2, g1, g2) for each row in forward; backward evaluates eq. 8 alone.

**Without log T.** For log-odds x = u + log T with T >= 1 (a and b of eq. 2), let e = exp(-|u|):

    softplus(x) = max(u, 0) + log(1 + y),    1 + y = T + e  where u > 0, else 1 + T e
    sigmoid(x)  = T q / (1 + y),             q = 1 where u > 0, else e                             (eq. 9)

No sum cancels, and c of eq. 7 needs no division by T. The native kernels take this form, and sigmoid(a)^gamma of
eq. 3 from the sigmoid itself.

**Edges**, in this order of precedence:

1. an ignored row has loss 0 and gradient 0, whatever its logits hold;
2. a label outside [0, C) makes its row NaN and counts as a kept row of weight 0;
3. a class weight of zero makes that term's loss and gradient exactly 0; a term with coefficient 0 is not evaluated;
4. NaN or +inf in a row, or z_y = -inf without a finite competitor: NaN loss and gradient;
5. no finite competitor and a finite z_y: loss 0, gradient 0;
6. z_y = -inf with competitors: loss +inf, gradient finite (d focal / da = d ldam / db = 1).
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

NONE, MEAN, SUM = 0, 1, 2

# Looked up once, at import: torch.compile cannot trace the looking before torch 2.13.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu", "privateuseone") if is_autocast_available(name)
)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, operations on tensors of this device type keep their dtypes."""
    if device_type in AUTOCAST_DEVICES:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), accurate relative to its value, as are its first and second derivatives."""
    positive = x > 0
    # torch.where, not abs and clamp: their derivatives at x = 0 (all logits equal) would not add up to 1/2.
    return torch.where(positive, x, 0.0) + torch.log1p(torch.exp(torch.where(positive, -x, x)))


def focal_of_log_odds(a: Tensor, gamma: float) -> Tensor:
    """Eq. 3 and 4; beyond a = 1e4, where exp(-a) = 0, `a` itself: no 0 * inf in its derivatives (edge 6)."""
    saturated = a > 1e4
    moderate = torch.where(saturated, 0.0, a)
    focal = torch.exp(-gamma * softplus(-moderate)) * softplus(moderate)
    return torch.where(saturated, a, focal)


def _per_row(table: Tensor | None, y: Tensor, default: float, acc: torch.dtype) -> Tensor:
    return torch.full_like(y, default, dtype=acc) if table is None else table.to(acc)[y]


def reference_loss(
    logits: Tensor,  # (N, C, ...)
    target: Tensor,  # (N, ...), int64
    margins: Tensor | None,  # (C,)
    ldam_weight: Tensor | None,  # (C,)
    focal_weight: Tensor | None,  # (C,)
    ldam_normalizer: Tensor | None,  # ()
    focal_normalizer: Tensor | None,  # ()
    alpha: float,
    beta: float,
    gamma: float,
    s: float,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """The LMF loss in eager PyTorch; takes the arguments of the forward ops and is differentiable to any order.

    Bad labels poison their row with NaN (edge 2); nothing here synchronises with the device.
    """
    with no_autocast(logits.device.type):
        acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
        num_classes = logits.shape[1]
        kept = target != ignore_index
        bad = kept & ((target < 0) | (target >= num_classes))
        valid = kept & ~bad
        y = torch.where(valid, target, 0)
        w_ldam = _per_row(ldam_weight, y, 1.0, acc)
        w_focal = _per_row(focal_weight, y, 1.0, acc)
        margin = _per_row(margins, y, 0.0, acc)

        # Rows with a zero gradient are cut off at the input, so that no 0 * NaN can arise (edges 1 and 3).
        weighted = (w_ldam != 0) & (alpha != 0) | (w_focal != 0) & (beta != 0)
        live = bad | (valid & weighted)
        z = torch.where(live.unsqueeze(1), logits.to(acc), 0.0)

        classes = torch.arange(num_classes, device=z.device).view(-1, *[1] * (z.dim() - 2))
        is_target = classes == y.unsqueeze(1)
        z_y = z.gather(1, y.unsqueeze(1)).squeeze(1)
        competitors = z.masked_fill(is_target, -math.inf)
        m = competitors.detach().amax(1)
        poison = bad | z_y.isnan() | (z_y == math.inf) | m.isnan() | (m == math.inf)
        poison = poison | ((z_y == -math.inf) & (m == -math.inf))
        # Added, not filled in, so that the gradient is NaN as well (edges 2 and 4).
        nan = torch.where(poison, math.nan, 0.0).to(acc)
        z_y = z_y + nan
        m = torch.where(m == -math.inf, 0.0, m)
        d = competitors + (nan - m).unsqueeze(1)

        def log_sum_and_alone(exponent: Tensor) -> tuple[Tensor, Tensor]:
            t = exponent.exp().sum(1)
            alone = t == 0  # no finite competitor (edge 5)
            return torch.where(alone, 1.0, t).log(), alone

        terms = []
        if beta != 0:
            log_t1, alone = log_sum_and_alone(d)
            a = (m - z_y) + log_t1
            silent = alone | ~kept | ((w_focal == 0) & ~bad)
            focal = torch.where(silent, 0.0, focal_of_log_odds(a, gamma))
            terms.append(beta * _reduce(w_focal * focal, kept.to(acc), focal_normalizer, reduction))
        if alpha != 0:
            log_t2, alone = log_sum_and_alone(s * d)
            b = s * ((m - z_y) + margin) + log_t2
            silent = alone | ~kept | ((w_ldam == 0) & ~bad)
            ldam = torch.where(silent, 0.0, softplus(b))
            terms.append(alpha * _reduce(w_ldam * ldam, w_ldam * valid, ldam_normalizer, reduction))
        if not terms:
            return z.sum(1) * 0.0 if reduction == NONE else z.sum() * 0.0
        return terms[0] + terms[1] if len(terms) == 2 else terms[0]


def _reduce(terms: Tensor, share: Tensor, normalizer: Tensor | None, reduction: int) -> Tensor:
    """Reduces one term; `share` is each row's part of the denominator of 'mean'."""
    if reduction == NONE:
        return terms
    if reduction == SUM:
        return terms.sum()
    return terms.sum() / (share.sum() if normalizer is None else normalizer.to(terms.dtype))
