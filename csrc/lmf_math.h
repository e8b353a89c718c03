// The mathematics of one row once its statistics are known: equations 2 to 7 and the edges of
// lmf_kernels/reference.py, for the CPU (a vector of rows at a time) and CUDA (one row at a time).
// `Math` supplies the value type and the elementary functions.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LMF_HD __host__ __device__ __forceinline__
#else
#define LMF_HD inline
#endif

namespace lmf {

// One row at a time, in plain floating point.
template <typename T>
struct ScalarMath {
  using Scalar = T;
  using Value = T;
  using Mask = bool;
  static LMF_HD T of(T x) { return x; }
  static LMF_HD T exp(T x) { return ::exp(x); }
  static LMF_HD T log(T x) { return ::log(x); }
  static LMF_HD T log1p(T x) { return ::log1p(x); }
  static LMF_HD T ratio(T x, T y) { return x / y; }  // y >= 1
  static LMF_HD T select(bool condition, T yes, T no) { return condition ? yes : no; }
};

template <typename T>
struct Options {
  T alpha, beta, gamma, s;
};

// All that a row's statistics tell once they are complete.
template <typename Math>
struct Statistics {
  typename Math::Value m, t1, t2;  // eq. 1; t2 = t1 when s = 1; 0 without a finite competitor
  typename Math::Value z_y;
};

// One term's weighted loss, and its c and g of eq. 7.
template <typename Math>
struct Term {
  typename Math::Value loss, c, g;
};

// softplus(x) and sigmoid(x) of both signs from one exponential and one logarithm; accurate relative to their values.
template <typename Math>
struct LogOdds {
  using Value = typename Math::Value;
  using Scalar = typename Math::Scalar;
  Value softplus, softplus_negative, sigmoid, sigmoid_negative;

  LMF_HD explicit LogOdds(Value x) {
    const Value zero = Math::of(Scalar(0)), one = Math::of(Scalar(1));
    const auto positive = x > zero;
    const Value e = Math::exp(Math::select(positive, -x, x));
    const Value tail = Math::log1p(e);
    const Value inverse = Math::ratio(one, one + e);
    softplus = Math::select(positive, x, zero) + tail;
    softplus_negative = Math::select(positive, zero, -x) + tail;
    sigmoid = Math::select(positive, one, e) * inverse;
    sigmoid_negative = Math::select(positive, e, one) * inverse;
  }
};

// Edges 1, 3 and 5: rows whose loss and gradient in this term are stored zeros, whatever their logits hold.
template <typename Math>
LMF_HD Term<Math> silenced(typename Math::Mask silent, Term<Math> term) {
  const auto zero = Math::of(typename Math::Scalar(0));
  return {Math::select(silent, zero, term.loss), Math::select(silent, zero, term.c),
          Math::select(silent, zero, term.g)};
}

// Edge 4: z_y = +inf, or z_y = -inf without a finite competitor; NaN elsewhere is already in t1 and t2.
template <typename Math>
LMF_HD typename Math::Value log_odds_gap(const Statistics<Math>& row, typename Math::Mask alone) {
  using Scalar = typename Math::Scalar;
  const auto infinity = Math::of(std::numeric_limits<Scalar>::infinity());
  const auto nan = Math::of(std::numeric_limits<Scalar>::quiet_NaN());
  return Math::select((row.z_y == infinity) | (alone & (row.z_y == -infinity)), nan, row.m - row.z_y);
}

// beta * w_focal * sigmoid(a)^gamma * softplus(a): eq. 2 to 5.
template <typename Math>
LMF_HD Term<Math> focal_term(const Statistics<Math>& row, typename Math::Mask ignored, typename Math::Value w_focal,
                             const Options<typename Math::Scalar>& o) {
  using Scalar = typename Math::Scalar;
  using Value = typename Math::Value;
  const typename Math::Mask alone = row.t1 == Math::of(Scalar(0));
  const Value gap = log_odds_gap<Math>(row, alone);
  const Value a = gap + Math::log(row.t1);
  const LogOdds<Math> odds(a);
  const Value modulation = Math::exp(-o.gamma * odds.softplus_negative);
  // At a = +inf sigmoid(-a) = 0 meets softplus(a) = inf; their product's limit is 0 (edge 6).
  const Value largest = Math::of(std::numeric_limits<Scalar>::max());
  const Value bounded = Math::select(odds.softplus > largest, largest, odds.softplus);
  const Value slope = modulation * (odds.sigmoid + o.gamma * odds.sigmoid_negative * bounded);
  const Value g = o.beta * w_focal * slope;
  return silenced<Math>(ignored | (w_focal == Math::of(Scalar(0))) | (alone & (gap == gap)),
                        {w_focal * (modulation * odds.softplus), Math::ratio(g, row.t1), g});
}

// alpha * w_ldam * softplus(b): eq. 2, 3 and 6.
template <typename Math>
LMF_HD Term<Math> ldam_term(const Statistics<Math>& row, typename Math::Mask ignored, typename Math::Value margin,
                            typename Math::Value w_ldam, const Options<typename Math::Scalar>& o) {
  using Scalar = typename Math::Scalar;
  using Value = typename Math::Value;
  const typename Math::Mask alone = row.t2 == Math::of(Scalar(0));
  const Value gap = log_odds_gap<Math>(row, alone);
  const Value b = o.s * (gap + margin) + Math::log(row.t2);
  const LogOdds<Math> odds(b);
  const Value g = o.alpha * o.s * w_ldam * odds.sigmoid;
  return silenced<Math>(ignored | (w_ldam == Math::of(Scalar(0))) | (alone & (gap == gap)),
                        {w_ldam * odds.softplus, Math::ratio(g, row.t2), g});
}

}  // namespace lmf
