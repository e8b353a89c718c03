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

import math

import torch
from torch import Tensor

from .._call import MEAN, NONE, Options, Tables
from .rows import (
    accumulation_dtype,
    denominators,
    focal_log_odds,
    focal_term,
    is_live,
    ldam_log_odds,
    ldam_term,
    look_up,
    no_autocast,
    or_zero,
    read_labels,
    reduce,
)


def reference_loss(
    logits: Tensor,  # (N, C, ...)
    target: Tensor,  # (N, ...), int64
    tables: Tables,
    options: Options,
) -> Tensor:
    """The LMF loss in eager PyTorch, differentiable to any order.

    Bad labels poison their row with NaN (edge 2); nothing here synchronises with the device.
    """
    alpha, beta, gamma, s, ignore_index, reduction = options
    with no_autocast(logits.device.type):
        acc = accumulation_dtype(logits.dtype)
        num_classes = logits.shape[1]
        labels = read_labels(target, num_classes, ignore_index)
        rows = look_up(tables, labels.y, acc)

        # Rows with a zero gradient are cut off at the input, so that no 0 * NaN can arise (edges 1 and 3).
        live = labels.valid & is_live(rows, alpha, beta) | labels.bad
        z = torch.where(live.unsqueeze(1), logits.to(acc), 0.0)

        classes = torch.arange(num_classes, device=z.device).view(-1, *[1] * (z.dim() - 2))
        is_target = classes == labels.y.unsqueeze(1)
        z_y = z.gather(1, labels.y.unsqueeze(1)).squeeze(1)
        competitors = z.masked_fill(is_target, -math.inf)
        m = competitors.detach().amax(1)
        poison = labels.bad | z_y.isnan() | (z_y == math.inf) | m.isnan() | (m == math.inf)
        poison = poison | ((z_y == -math.inf) & (m == -math.inf))
        # Added, not filled in, so that the gradient is NaN as well (edges 2 and 4).
        nan = torch.where(poison, math.nan, 0.0).to(acc)
        m = or_zero(m)
        d = competitors + (nan - m).unsqueeze(1)
        gap = m - (z_y + nan)
        ldam = focal = None
        if alpha != 0:
            ldam = ldam_term(ldam_log_odds(gap, (s * d).exp().sum(1), rows, labels, s))
        if beta != 0:
            focal = focal_term(focal_log_odds(gap, d.exp().sum(1), rows, labels), gamma)
        if ldam is None and focal is None:
            return z.sum(1) * 0.0 if reduction == NONE else z.sum() * 0.0
        over = denominators(labels, rows.w_ldam, tables, acc) if reduction == MEAN else None
        return reduce(ldam, focal, over, options)
