# mypy: allow-untyped-defs
"""The mathematics of one row in Triton: eq. 1 to 7 of reference.py, with its names. kernels.py builds on it."""

import os
from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
POS_INF = tl.constexpr(float("inf"))
# Triton's interpreter truncates to bfloat16, compiled code rounds.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


class Terms(NamedTuple):
    """What is evaluated at all."""

    ldam: bool  # alpha != 0
    focal: bool  # beta != 0
    t1: bool
    t2: bool  # not when s = 1: then ldam uses t1


# ---- elementary functions -------------------------------------------------------------------------------------------
@triton.jit
def _exp(x, scale):
    """exp(scale * x); in float32 one product and ex2.approx."""
    if x.dtype == tl.float64:
        return tl.exp(scale * x)
    else:
        return tl.exp2(x * (scale * LOG2_E))


@triton.jit
def _log1p(u):
    """log(1 + u) for u in [0, 1], accurate relative to its value: 2 atanh(f) with f = u / (2 + u) <= 1/3."""
    TERMS: tl.constexpr = 17 if u.dtype == tl.float64 else 8
    f = u / (2.0 + u)
    series = tl.full(u.shape, 1.0 / (2 * TERMS + 1), u.dtype)
    for i in tl.static_range(TERMS):
        series = tl.fma(series, f * f, tl.full(u.shape, 1.0 / (2 * (TERMS - i) - 1), u.dtype))
    return 2.0 * f * series


@triton.jit
def _softplus_and_sigmoid(x):
    """softplus(x), softplus(-x), sigmoid(x), sigmoid(-x); x > -inf."""
    e = _exp(-tl.abs(x), 1.0)
    log1p_e = _log1p(e)
    larger = 1.0 / (1.0 + e)
    positive = x >= 0
    return (
        tl.maximum(x, 0.0) + log1p_e,
        tl.maximum(-x, 0.0) + log1p_e,
        tl.where(positive, larger, e * larger),
        tl.where(positive, e * larger, larger),
    )


@triton.jit
def _is_nan(x):
    return x != x


@triton.jit
def _round(x, dtype: tl.constexpr):
    """x in a dtype that may be narrower, to the nearest and ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + (bits >> 16 & 1) & -0x10000
        x = tl.where(_is_nan(x), x, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)


# ---- sums over the competitors, eq. 1 -------------------------------------------------------------------------------
@triton.jit
def _or_zero(m):
    """What exponents are relative to: m, but 0 where nothing is finite, so that exp(-inf - 0) = 0 and not NaN."""
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def _lane_sum(x):
    """(K, L, V) -> (L,), within each thread."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _add3(a1, a2, a3, b1, b2, b3):
    return a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add4(a1, a2, a3, a4, b1, b2, b3, b4):
    return a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _accumulate(z, m, t1, t2, s, TERMS: tl.constexpr, FIRST: tl.constexpr):
    """Takes competitors z (K, L, V) into the running m, t1, t2 (L,). A NaN that the maximum drops stays in t1, t2."""
    top = tl.max(tl.max(z, 2), 0)
    if not FIRST:
        top = tl.maximum(m, top)
    base = _or_zero(top)
    d = z - base[None, :, None]
    if not FIRST:
        if TERMS.t1:
            t1 *= _exp(m - base, 1.0)
        if TERMS.t2:
            t2 *= _exp(m - base, s)
    if TERMS.t1:
        t1 += _lane_sum(_exp(d, 1.0))
    if TERMS.t2:
        t2 += _lane_sum(_exp(d, s))
    return top, t1, t2


@triton.jit
def _combine(m, t1, t2, z_y, s, TERMS: tl.constexpr):
    """The parts of a row together: (n, parts) -> (n,)."""
    top = tl.max(m, 1)
    d = m - _or_zero(top)[:, None]
    if TERMS.t1:
        t1 *= _exp(d, 1.0)
    if TERMS.t2:
        t2 *= _exp(d, s)
    t1, t2, z_y = tl.reduce((t1, t2, z_y), 1, _add3)
    return top, t1, t2, z_y


# ---- from the sums to the loss and what is saved, eq. 2 to 7 ------------------------------------------------------
@triton.jit
def _look_up(table, y, valid, default: tl.constexpr, acc: tl.constexpr):
    """table[y] (n,); an invalid label is not dereferenced."""
    if table is None:
        return tl.full(y.shape, default, acc)
    else:
        return tl.load(table + y, mask=valid, other=0.0).to(acc)


@triton.jit
def _with_edges(value, weight, kept, valid, poison):
    """weight * value, with the edges in order: ignored 0, bad label NaN, zero weight 0, NaN or +inf in the row NaN."""
    value = weight * tl.where(poison, float("nan"), value)
    value = tl.where(weight == 0, 0.0, value)
    return tl.where(valid, value, tl.where(kept, float("nan"), 0.0))


@triton.jit
def _finish_rows(m, t1, t2, z_y, y, kept, valid, tables, options, TERMS: tl.constexpr):
    """Weighted ldam and focal, the row's share of the LDAM denominator, and c1, c2, g1, g2, all (n,)."""
    acc: tl.constexpr = m.dtype
    margins, ldam_weight, focal_weight = tables
    alpha, beta, gamma, s = options
    zero = tl.zeros(m.shape, acc)
    ldam, focal, c1, c2, g1, g2 = zero, zero, zero, zero, zero, zero
    w_ldam = tl.where(valid, _look_up(ldam_weight, y, valid, 1.0, acc), 0.0)
    gap = m - z_y
    # t1 and t2, where computed, are NaN if a competitor is NaN or +inf; gap is if both sides are -inf.
    poison = _is_nan(gap) | _is_nan(t1) | _is_nan(t2) | (z_y == POS_INF)
    if TERMS.focal:
        w_focal = _look_up(focal_weight, y, valid, 1.0, acc)
        a = tl.maximum(gap + tl.log(t1), -1e30)  # no finite competitor: loss and slope become 0, without 0 * inf
        softplus_a, softplus_minus_a, sigmoid_a, sigmoid_minus_a = _softplus_and_sigmoid(a)
        modulation = _exp(softplus_minus_a, -gamma)
        slope = tl.where(a == POS_INF, 1.0, sigmoid_a + gamma * sigmoid_minus_a * softplus_a)
        focal = _with_edges(modulation * softplus_a, w_focal, kept, valid, poison)
        g1 = _with_edges(beta * (modulation * slope), w_focal, kept, valid, poison)
        c1 = tl.where(g1 == 0, 0.0, g1 / t1)
    if TERMS.ldam:
        if not TERMS.t2:
            t2 = t1
        b = tl.maximum(s * (gap + _look_up(margins, y, valid, 0.0, acc)) + tl.log(t2), -1e30)
        softplus_b, _, sigmoid_b, _ = _softplus_and_sigmoid(b)
        ldam = _with_edges(softplus_b, w_ldam, kept, valid, poison)
        g2 = _with_edges(alpha * s * sigmoid_b, w_ldam, kept, valid, poison)
        c2 = tl.where(g2 == 0, 0.0, g2 / t2)
    return ldam, focal, w_ldam, c1, c2, g1, g2
