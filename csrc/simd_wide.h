// Several vectors as one value. The mathematics of a row is a chain of some hundred instructions of which each waits
// for the one before; with independent rows side by side they overlap.
#pragma once

#include "simd.h"

namespace lmf {
namespace LMF_ISA {

constexpr int kWide = 4;

template <typename V>
struct Wide {
  V v[kWide];
};

template <typename Function>
inline auto each(Function function) {
  return Wide<decltype(function(0))>{{function(0), function(1), function(2), function(3)}};
}
static_assert(kWide == 4, "each() names every part");

#define LMF_WIDE_OPERATOR(OP)                                   \
  template <typename V>                                         \
  inline auto operator OP(const Wide<V>& x, const Wide<V>& y) { \
    return each([&](int i) { return x.v[i] OP y.v[i]; });       \
  }
LMF_WIDE_OPERATOR(+)
LMF_WIDE_OPERATOR(-)
LMF_WIDE_OPERATOR(*)
LMF_WIDE_OPERATOR(>)
LMF_WIDE_OPERATOR(<)
LMF_WIDE_OPERATOR(==)
LMF_WIDE_OPERATOR(&)
LMF_WIDE_OPERATOR(|)
#undef LMF_WIDE_OPERATOR

template <typename V>
inline Wide<V> operator-(const Wide<V>& x) {
  return each([&](int i) { return -x.v[i]; });
}
template <typename V, typename S>
inline Wide<V> operator*(S scalar, const Wide<V>& x) {
  return each([&](int i) { return scalar * x.v[i]; });
}

// What lmf_math.h asks for, on kWide vectors of M's.
template <typename M>
struct WideMath {
  using Scalar = typename M::Scalar;
  using Value = Wide<typename M::Value>;
  using Mask = Wide<typename M::Mask>;
  static constexpr int kLanes = kWide * M::kLanes;

  static inline Value of(Scalar x) {
    return each([&](int) { return M::of(x); });
  }
  static inline Value exp(const Value& x) {
    return each([&](int i) { return M::exp(x.v[i]); });
  }
  static inline Value log1p(const Value& x) {
    return each([&](int i) { return M::log1p(x.v[i]); });
  }
  static inline Value power(const Value& x, Scalar gamma) {
    return each([&](int i) { return M::power(x.v[i], gamma); });
  }
  static inline Value ratio(const Value& x, const Value& y) {
    return each([&](int i) { return M::ratio(x.v[i], y.v[i]); });
  }
  static inline Value select(const Mask& mask, const Value& yes, const Value& no) {
    return each([&](int i) { return M::select(mask.v[i], yes.v[i], no.v[i]); });
  }
};

template <typename A>
inline auto load_wide(const A* p) {
  return each([&](int i) { return load(p + i * VectorMath<A>::kLanes); });
}

// Stores the first `count` lanes, or all if there are fewer.
template <typename A, typename V>
inline void store_wide(A* p, const Wide<V>& x, int64_t count) {
  constexpr int kLanes = VectorMath<A>::kLanes;
  if (count >= kWide * kLanes) {
    for (int i = 0; i < kWide; i++) store(p + i * kLanes, x.v[i]);
  } else {
    for (int i = 0; i < kWide; i++) store_some(p + i * kLanes, x.v[i], count - i * kLanes);
  }
}

// The sum of the parts, in a fixed order.
template <typename V>
inline V sum_parts(const Wide<V>& x) {
  return (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]);
}

}  // namespace LMF_ISA
}  // namespace lmf
