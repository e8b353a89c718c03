// The mathematics of one row once its statistics are known: equations 2 to 7 and the edges of
// lmf_kernels/reference.py, for the CPU (a vector of rows at a time) and CUDA (one row at a time).
// `Math` supplies the value type and the elementary functions.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LMF_HD __host__ __device__ __forceinline__
#else
#define LMF_HD inline __attribute__((always_inline))
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
  static LMF_HD T log1p(T x) { return ::log1p(x); }
  // x^gamma for x in [0, 1]; what is below the normal numbers counts as the smallest of them.
  static LMF_HD T power(T x, T gamma) {
    constexpr T smallest = std::numeric_limits<T>::min();
    return ::exp(gamma * ::log(x < smallest ? smallest : x));
  }
  static LMF_HD T ratio(T x, T y) { return x / y; }  // y >= 1
  static LMF_HD T select(bool condition, T yes, T no) { return condition ? yes : no; }
};

template <typename T>
struct Options {
  T alpha, beta, gamma, s;
};

// All that a row's statistics tell once they are complete.
template <typename Math>
struct RowSums {
  typename Math::Value m, t1, t2;  // eq. 1; t2 = t1 when s = 1; 0 without a finite competitor
  typename Math::Value z_y;
};

// One term's weighted loss, and its c and g of eq. 7.
template <typename Math>
struct Term {
  typename Math::Value loss, c, g;
};

// softplus(x) and sigmoid(x) of both signs for the log-odds x = u + log(t), t >= 1, by eq. 9: one exponential and one
// logarithm; accurate relative to their values.
template <typename Math>
struct LogOdds {
  using Value = typename Math::Value;
  using Scalar = typename Math::Scalar;
  Value softplus, sigmoid, sigmoid_negative;
  Value share;  // sigmoid / t

  LMF_HD LogOdds(Value u, Value t) {
    const Value zero = Math::of(Scalar(0)), one = Math::of(Scalar(1));
    const auto positive = u > zero;
    const Value e = Math::exp(Math::select(positive, -u, u));
    const Value y = Math::select(positive, (t - one) + e, t * e);
    const Value inverse = Math::ratio(one, one + y);
    softplus = Math::select(positive, u, zero) + Math::log1p(y);
    share = Math::select(positive, one, e) * inverse;
    sigmoid = t * share;
    sigmoid_negative = Math::select(positive, e, one) * inverse;
  }
};

// m - z_y, with edge 4 (z_y = +inf, or z_y = -inf without a finite competitor; NaN elsewhere is already in t1 and t2)
// and the rows of edges 1 and 5, whose terms are stored zeros, whatever their logits hold.
template <typename Math>
struct Gap {
  typename Math::Value value;
  typename Math::Mask silent;

  LMF_HD Gap(const RowSums<Math>& row, typename Math::Mask ignored) {
    using Scalar = typename Math::Scalar;
    const auto infinity = Math::of(std::numeric_limits<Scalar>::infinity());
    const auto nan = Math::of(std::numeric_limits<Scalar>::quiet_NaN());
    const typename Math::Mask alone = row.t1 == Math::of(Scalar(0));
    value = Math::select((row.z_y == infinity) | (alone & (row.z_y == -infinity)), nan, row.m - row.z_y);
    silent = ignored | (alone & (value == value));
  }
};

// Edge 3 as well: zeros where the class weight is zero.
template <typename Math>
LMF_HD Term<Math> unless_silent(typename Math::Mask silent, typename Math::Value weight, Term<Math> term) {
  const auto zero = Math::of(typename Math::Scalar(0));
  const typename Math::Mask none = silent | (weight == zero);
  return {Math::select(none, zero, term.loss), Math::select(none, zero, term.c), Math::select(none, zero, term.g)};
}

// beta * w_focal * sigmoid(a)^gamma * softplus(a): eq. 2 to 5.
template <typename Math>
LMF_HD Term<Math> focal_term(const Gap<Math>& gap, typename Math::Value t1, typename Math::Value w_focal,
                             const Options<typename Math::Scalar>& o) {
  using Scalar = typename Math::Scalar;
  using Value = typename Math::Value;
  const LogOdds<Math> odds(gap.value, t1);
  const Value modulation = Math::power(odds.sigmoid, o.gamma);
  // At a = +inf sigmoid(-a) = 0 meets softplus(a) = inf; their product's limit is 0 (edge 6).
  const Value largest = Math::of(std::numeric_limits<Scalar>::max());
  const Value bounded = Math::select(odds.softplus > largest, largest, odds.softplus);
  const Value slope = modulation * (odds.sigmoid + o.gamma * odds.sigmoid_negative * bounded);
  const Value g = o.beta * w_focal * slope;
  return unless_silent<Math>(gap.silent, w_focal, {w_focal * (modulation * odds.softplus), Math::ratio(g, t1), g});
}

// alpha * w_ldam * softplus(b): eq. 2, 3 and 6.
template <typename Math>
LMF_HD Term<Math> ldam_term(const Gap<Math>& gap, typename Math::Value t2, typename Math::Value margin,
                            typename Math::Value w_ldam, const Options<typename Math::Scalar>& o) {
  const LogOdds<Math> odds(o.s * (gap.value + margin), t2);
  const typename Math::Value c = o.alpha * o.s * w_ldam * odds.share;
  return unless_silent<Math>(gap.silent, w_ldam, {w_ldam * odds.softplus, c, c * t2});
}

}  // namespace lmf
