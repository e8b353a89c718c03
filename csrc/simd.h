// Vectors and their elementary functions, for the instruction set that the including file was compiled for. They are
// the vector extensions of GCC and Clang, so that one source serves AVX-512, AVX2, SSE2 and NEON; intrinsics appear
// only where the compilers have no other word for an instruction (half-precision conversion).
//
// LMF_ISA names the namespace (one per instruction set: their functions must not be merged by the linker) and
// LMF_VECTOR_BYTES the width. No inline function of the standard library is called here, for the same reason.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "lmf_math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lmf {
namespace LMF_ISA {

template <typename T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};

using f32v = VectorOf<float, LMF_VECTOR_BYTES>::type;
using i32v = VectorOf<int32_t, LMF_VECTOR_BYTES>::type;
using f64v = VectorOf<double, LMF_VECTOR_BYTES>::type;
using i64v = VectorOf<int64_t, LMF_VECTOR_BYTES>::type;

template <typename V>
inline V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

// Results below the normal numbers become 0 while this object lives. Gradients of improbable classes fall there in
// masses, and x86 handles each such result by a microcode trap of a hundred cycles.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  const unsigned saved_;
#endif
};

// The numbers of a vector's lanes, for shuffles.
template <int... k>
struct Lanes {};
template <int n, int... k>
struct CountLanes : CountLanes<n - 1, n - 1, k...> {};
template <int... k>
struct CountLanes<0, k...> {
  using type = Lanes<k...>;
};

// Each lane of v from the lane whose number differs in the bit `distance`.
template <int distance, typename M, int... k>
inline typename M::Value exchanged(typename M::Value v, Lanes<k...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (k ^ distance)...);
#else
  return __builtin_shuffle(v, typename M::Mask{(k ^ distance)...});
#endif
}

template <typename M, int... k>
inline typename M::Mask numbers_of(Lanes<k...>) {
  return typename M::Mask{k...};
}
template <typename M>
inline typename M::Mask lane_numbers() {
  return numbers_of<M>(typename CountLanes<M::kLanes>::type());
}

// All lanes into one, by halves.
template <typename M, int distance = M::kLanes / 2, typename Function>
inline typename M::Scalar reduce(typename M::Value v, Function function) {
  if constexpr (distance == 0) {
    return v[0];
  } else {
    const auto other = exchanged<distance, M>(v, typename CountLanes<M::kLanes>::type());
    return reduce<M, distance / 2>(function(v, other), function);
  }
}

template <typename T>
struct VectorMath;

template <>
struct VectorMath<float> {
  using Scalar = float;
  using Value = f32v;
  using Mask = i32v;
  static constexpr int kLanes = LMF_VECTOR_BYTES / sizeof(float);

  static inline f32v of(float x) { return f32v{} + x; }
  static inline f32v select(i32v mask, f32v yes, f32v no) { return mask ? yes : no; }
  // y where x is NaN
  static inline f32v max(f32v x, f32v y) {
#if LMF_VECTOR_BYTES == 64
    return (f32v)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)y);
#elif LMF_VECTOR_BYTES == 32
    return (f32v)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return x > y ? x : y;
#endif
  }
  static inline float largest(f32v x) {
    return reduce<VectorMath>(x, [](f32v a, f32v b) { return max(a, b); });
  }
  static inline float sum(f32v x) {
    return reduce<VectorMath>(x, [](f32v a, f32v b) { return a + b; });
  }

  // x / y for y in [1, 2^30], to 1 ulp: a division takes as long as ten multiplications.
  static inline f32v ratio(f32v x, f32v y) {
#if LMF_VECTOR_BYTES == 64
    const f32v r = (f32v)_mm512_maskz_rcp14_ps(0xffff, (__m512)y);
    const f32v q = x * r;
    return q + r * (x - q * y);
#else
    return x / y;
#endif
  }

  // Labels as they are staged: negative where a row is ignored.
  static inline i32v load_labels(const int32_t* y) { return load_bits<i32v>(y); }
  static inline f32v gather(const float* table, i32v index) {
#if LMF_VECTOR_BYTES == 64
    return (f32v)_mm512_mask_i32gather_ps(__m512{}, 0xffff, (__m512i)index, table, 4);
#elif LMF_VECTOR_BYTES == 32
    return (f32v)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    return f32v{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
#endif
  }

  // A table of at most kRegisterTable values in two registers: one instruction where a gather takes dozens of cycles.
#if LMF_VECTOR_BYTES == 64
  static constexpr int kRegisterTable = 32;
  static inline f32v permute(f32v low, f32v high, i32v index) {
    return (f32v)_mm512_permutex2var_ps((__m512)low, (__m512i)index, (__m512)high);
  }
#elif LMF_VECTOR_BYTES == 32
  static constexpr int kRegisterTable = 8;
  static inline f32v permute(f32v low, f32v, i32v index) {
    return (f32v)_mm256_permutevar8x32_ps((__m256)low, (__m256i)index);
  }
#else
  static constexpr int kRegisterTable = 0;
  static inline f32v permute(f32v low, f32v, i32v) { return low; }
#endif

  // The factor of an exponent: exp(x, scale) is exp(s x).
  struct Scale {
    float log2, lowest;  // s log2(e); an x from which on exp(s x) is 0
    explicit Scale(float s) : log2(s * 1.44269504f), lowest(-150.0f / log2) {}
  };

  // exp(s x) for s x <= 0 to 1 ulp beside the rounding of the factor; NaN for NaN, 0 below the normal numbers.
  static inline f32v exp(f32v x, Scale scale) {
#if LMF_VECTOR_BYTES == 64
    const f32v bounded = max(of(scale.lowest), x);  // -inf - -inf would be NaN below
    const f32v n = (f32v)_mm512_maskz_roundscale_ps(0xffff, (__m512)(bounded * scale.log2), _MM_FROUND_TO_NEAREST_INT);
    const f32v p = exp2_reduced(bounded * scale.log2 - n);
    return (f32v)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
    // Adding 1.5 * 2^23 rounds to an integer n in the low bits; the 127 on top makes them the exponent of 2^n. The
    // bounds let everything below 2^-127 end as n = -127, whose 2^n is stored as 0.
    constexpr float kRound = 12582912.0f + 127.0f;
    const f32v rounded = max(x * scale.log2 + kRound, of(kRound - 127.0f));
    const f32v n = rounded - kRound;
    const f32v p = exp2_reduced(max(of(-1.0f), x * scale.log2 - n));  // keeps NaN
    return p * reinterpret_cast<f32v>(reinterpret_cast<i32v>(rounded) << 23);
#endif
  }
  // 2^f for f in [-1/2, 1/2], minimax in relative error with 2^0 = 1.
  static inline f32v exp2_reduced(f32v f) {
    f32v p = of(1.55946764e-4f);
    p = p * f + 1.34066434e-3f;
    p = p * f + 9.61769279e-3f;
    p = p * f + 5.55031039e-2f;
    p = p * f + 0.240226522f;
    p = p * f + 0.693147242f;
    return p * f + 1.0f;
  }
  static inline f32v exp(f32v x) { return exp(x, Scale(1.0f)); }

  // log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], relative to its value: the series in f / (2 + f) with minimax
  // coefficients.
  static inline f32v log1p_reduced(f32v f) {
    const f32v q = ratio(f, 2.0f + f);
    const f32v z = q * q;
    const f32v half_square = 0.5f * f * f;
    const f32v r = z * (0.66666662693f + z * (0.40000972152f + z * (0.28498786688f + z * 0.24279078841f)));
    return f - (half_square - q * (half_square + r));
  }

  // log(x) for normal x, NaN for NaN.
  static inline f32v log(f32v x) {
    constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
    constexpr int32_t kSqrtHalf = 0x3f3504f3;
    const i32v exponent = (reinterpret_cast<i32v>(x) - kSqrtHalf) >> 23;
    const f32v mantissa = reinterpret_cast<f32v>(reinterpret_cast<i32v>(x) - (exponent << 23));
    const f32v n = __builtin_convertvector(exponent, f32v);
    const f32v special = x - x;  // 0, but NaN for NaN, which the bits above lose
    return n * kLn2High + (log1p_reduced(mantissa - 1.0f) + (n * kLn2Low + special));
  }

  static inline f32v sqrt(f32v x) {
#if LMF_VECTOR_BYTES == 64
    return (f32v)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif LMF_VECTOR_BYTES == 32
    return (f32v)_mm256_sqrt_ps((__m256)x);
#else
    for (int lane = 0; lane < kLanes; lane++) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
#endif
  }
  // x^gamma for x in [0, 1]; what is below the normal numbers counts as the smallest of them.
  static inline f32v power(f32v x, float gamma) {
    const int twice = gamma <= 4.0f ? int(2.0f * gamma) : -1;
    if (float(twice) == 2.0f * gamma) {  // by roots and products, which are as exact and cheaper
      f32v result = twice & 1 ? sqrt(x) : of(1.0f);
      for (int k = twice / 2; k > 0; k--) result *= x;
      return result;
    }
    constexpr float smallest = std::numeric_limits<float>::min();
    return exp(gamma * log(x < smallest ? of(smallest) : x));
  }

  // log(1 + x) for x >= 0, NaN for NaN: 1 + x = 2^n (1 + f), where f loses nothing of a small x.
  static inline f32v log1p(f32v x) {
    constexpr int32_t kSqrtHalf = 0x3f3504f3, kOne = 0x3f800000;
    const i32v shifted = (reinterpret_cast<i32v>(1.0f + x) - kSqrtHalf) & ~0x7fffff;  // n, where the exponent is
    const f32v scale = reinterpret_cast<f32v>(kOne - shifted);                        // 2^-n
    const f32v n = __builtin_convertvector(shifted >> 23, f32v);
    return n * 0.693147181f + log1p_reduced(x * scale + (scale - 1.0f));
  }
};

// Double precision goes through the C library lane by lane: exactness counts there, not speed.
template <>
struct VectorMath<double> {
  using Scalar = double;
  using Value = f64v;
  using Mask = i64v;
  static constexpr int kLanes = LMF_VECTOR_BYTES / sizeof(double);

  static inline f64v of(double x) { return f64v{} + x; }
  static inline f64v select(i64v mask, f64v yes, f64v no) { return mask ? yes : no; }
  static inline f64v max(f64v x, f64v y) { return x > y ? x : y; }
  static inline double largest(f64v x) {
    return reduce<VectorMath>(x, [](f64v a, f64v b) { return max(a, b); });
  }
  static inline double sum(f64v x) {
    return reduce<VectorMath>(x, [](f64v a, f64v b) { return a + b; });
  }
  static inline f64v ratio(f64v x, f64v y) { return x / y; }
  static inline i64v load_labels(const int32_t* y) {
    return __builtin_convertvector((load_bits<VectorOf<int32_t, LMF_VECTOR_BYTES / 2>::type>(y)), i64v);
  }
  static inline f64v gather(const double* table, i64v index) {
    f64v values;
    for (int lane = 0; lane < kLanes; lane++) values[lane] = table[index[lane]];
    return values;
  }
  static constexpr int kRegisterTable = 0;
  static inline f64v permute(f64v low, f64v, i64v) { return low; }

  struct Scale {
    double s;
    explicit Scale(double s) : s(s) {}
  };
  static inline f64v exp(f64v x, Scale scale) { return exp(scale.s * x); }
  static inline f64v exp(f64v x) {
    return map(x, [](double v) { return __builtin_exp(v); });
  }
  static inline f64v power(f64v x, double gamma) {
    return map(x, [gamma](double v) { return ScalarMath<double>::power(v, gamma); });
  }
  static inline f64v log1p(f64v x) {
    return map(x, [](double v) { return __builtin_log1p(v); });
  }

 private:
  template <typename Function>
  static inline f64v map(f64v x, Function function) {
    for (int lane = 0; lane < kLanes; lane++) x[lane] = function(x[lane]);
    return x;
  }
};

// ---- logits and gradients in memory ------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

using u16v = VectorOf<uint16_t, LMF_VECTOR_BYTES / 2>::type;

inline f32v load(const float* p) { return load_bits<f32v>(p); }
inline f64v load(const double* p) { return load_bits<f64v>(p); }
inline f32v rounded(const float*, f32v v) { return v; }
inline f64v rounded(const double*, f64v v) { return v; }

inline f32v load(const BFloat16* p) {
  const i32v wide = __builtin_convertvector(load_bits<u16v>(p), i32v);
  return reinterpret_cast<f32v>(wide << 16);
}

inline u16v rounded(const BFloat16*, f32v v) {
  const i32v bits = reinterpret_cast<i32v>(v);
  const i32v nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? nearest_even : i32v{} + 0x7fc0, u16v);
}

#if LMF_VECTOR_BYTES == 64 && defined(__AVX512F__)
inline f32v load(const Half* p) { return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline u16v rounded(const Half*, f32v v) { return (u16v)_mm512_cvtps_ph((__m512)v, 0); }
#elif LMF_VECTOR_BYTES == 32 && defined(__F16C__)
inline f32v load(const Half* p) { return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline u16v rounded(const Half*, f32v v) { return (u16v)_mm256_cvtps_ph((__m256)v, 0); }
#else
// Half precision without conversion instructions. Scaling by a power of two moves the exponent bias and normalises
// subnormals in one exact multiplication; infinity and NaN keep their all-ones exponent.
inline f32v load(const Half* p) {
  const i32v wide = __builtin_convertvector(load_bits<u16v>(p), i32v);
  const i32v magnitude = (wide & 0x7fff) << 13;
  const f32v finite = reinterpret_cast<f32v>(magnitude) * 0x1p112f;
  const i32v special = magnitude | 0x7f800000;
  const i32v bits = (wide & 0x7c00) == 0x7c00 ? special : reinterpret_cast<i32v>(finite);
  return reinterpret_cast<f32v>(bits | ((wide & 0x8000) << 16));
}

inline u16v rounded(const Half*, f32v v) {
  const i32v bits = reinterpret_cast<i32v>(v);
  const i32v sign = (bits >> 16) & 0x8000;
  const i32v magnitude = bits & 0x7fffffff;
  const f32v absolute = reinterpret_cast<f32v>(magnitude);
  // Normal halves: rebias, round to nearest even in integers. Subnormal ones: adding 0.5 rounds at 2^-24.
  const i32v normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const i32v subnormal = reinterpret_cast<i32v>(absolute + 0.5f) - 0x3f000000;
  i32v half = magnitude < (113 << 23) ? subnormal : normal;
  half = magnitude >= (143 << 23) ? i32v{} + 0x7c00 : (half > 0x7c00 ? i32v{} + 0x7c00 : half);
  half = v == v ? half : i32v{} + 0x7e00;
  return __builtin_convertvector(half | sign, u16v);
}
#endif

// To memory, rounded to its type.
template <typename T, typename V>
inline void store(T* p, V v) {
  const auto values = rounded(p, v);
  std::memcpy(p, &values, sizeof(values));
}

// The first `count` elements at p, or all lanes if there are fewer; the other lanes are 0.
template <typename T>
inline auto load_some(const T* p, int64_t count) {
  constexpr int kLanes = VectorMath<typename Accumulate<T>::type>::kLanes;
  if (count >= kLanes) return load(p);
  T lanes[kLanes] = {};
  for (int lane = 0; lane < count; lane++) lanes[lane] = p[lane];
  return load(lanes);
}

// Stores the first `count` lanes, or all if there are fewer.
template <typename T, typename V>
inline void store_some(T* p, V v, int64_t count) {
  constexpr int kLanes = VectorMath<typename Accumulate<T>::type>::kLanes;
  if (count >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  for (int lane = 0; lane < count; lane++) p[lane] = lanes[lane];
}

// To memory past the caches, for what nobody reads soon; p must be aligned to what is written, and `fence` follow.
template <typename T, typename V>
inline void stream(T* p, V v) {
#if defined(__x86_64__)
  const auto values = rounded(p, v);
  if constexpr (sizeof(values) == 16) {
    return _mm_stream_si128((__m128i*)p, (__m128i)values);
#if LMF_VECTOR_BYTES >= 32
  } else if constexpr (sizeof(values) == 32) {
    return _mm256_stream_si256((__m256i*)p, (__m256i)values);
#endif
#if LMF_VECTOR_BYTES >= 64
  } else if constexpr (sizeof(values) == 64) {
    return _mm512_stream_si512((__m512i*)p, (__m512i)values);
#endif
  }
#endif
  store(p, v);
}

inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename T>
inline bool is_aligned(const T* p) {
  constexpr int bytes = LMF_VECTOR_BYTES / sizeof(typename Accumulate<T>::type) * sizeof(T);
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// ---- transposition -------------------------------------------------------------------------------------------------

// Swaps the off-diagonal blocks of `distance` lanes between two rows of a square matrix.
template <int distance, typename M, int... k>
inline void swap_blocks(typename M::Value& upper, typename M::Value& lower, Lanes<k...>) {
  const typename M::Value a = upper, b = lower;
#if defined(__clang__)
  upper = __builtin_shufflevector(a, b, (k & distance ? M::kLanes + k - distance : k)...);
  lower = __builtin_shufflevector(a, b, (k & distance ? M::kLanes + k : k + distance)...);
#else
  upper = __builtin_shuffle(a, b, typename M::Mask{(k & distance ? M::kLanes + k - distance : k)...});
  lower = __builtin_shuffle(a, b, typename M::Mask{(k & distance ? M::kLanes + k : k + distance)...});
#endif
}

// Transposes a square of kLanes vectors in registers.
template <typename M, int distance = M::kLanes / 2>
inline void transpose(typename M::Value (&rows)[M::kLanes]) {
  if constexpr (distance > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < M::kLanes; i++) {
      if (!(i & distance)) {
        swap_blocks<distance, M>(rows[i], rows[i + distance], typename CountLanes<M::kLanes>::type());
      }
    }
    transpose<M, distance / 2>(rows);
  }
}

}  // namespace LMF_ISA
}  // namespace lmf
