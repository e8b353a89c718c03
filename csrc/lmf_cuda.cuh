// Device code that forward and backward share: element types, 16-byte vectors, where rows are. The names are those of
// lmf_kernels/reference.py.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "lmf_cuda.h"
#include "lmf_math.h"

namespace lmf {
namespace cuda {

// ---- elements ------------------------------------------------------------------------------------------------------

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulate<T>::type;

__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

template <typename T>
__device__ __forceinline__ T narrow(Acc<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// exp(d * rate), where the rate of float has log2(e) in it: one rounded product and ex2.approx.
__device__ __forceinline__ float exponential(float d, float rate) { return exp2f(d * rate); }
__device__ __forceinline__ double exponential(double d, double rate) { return exp(d * rate); }

// The rates of the one or two exponentials of an element.
template <typename A, int n>
struct Rates {
  A rate[n];
  __device__ __forceinline__ explicit Rates(const Work& work) {
    rate[0] = static_cast<A>(work.rate1);
    if (n == 2) rate[n - 1] = static_cast<A>(work.rate2);
  }
};

template <typename A>
__device__ __forceinline__ A infinity() {
  return std::numeric_limits<A>::infinity();
}

// Reads a value of any floating dtype.
template <typename A>
__device__ __forceinline__ A load_table(const void* data, Table table, int64_t index) {
  const int64_t at = index * table.stride;
  switch (table.element) {
    case Element::kHalf:
      return static_cast<A>(widen(static_cast<const __half*>(data)[at]));
    case Element::kBFloat16:
      return static_cast<A>(widen(static_cast<const __nv_bfloat16*>(data)[at]));
    case Element::kFloat:
      return static_cast<A>(static_cast<const float*>(data)[at]);
    default:
      return static_cast<A>(static_cast<const double*>(data)[at]);
  }
}

// ---- vectors -------------------------------------------------------------------------------------------------------

constexpr int kVectorBytes = 16;

template <typename T, int n = kVectorBytes / sizeof(T)>
struct alignas(n * sizeof(T)) Vector {
  static constexpr int size = n;
  T at[n];
};

// Elements by which an address is past a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ int misalignment(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % kVectorBytes / sizeof(T));
}

// What is moved by one access.
template <int bytes>
struct Bits;
template <>
struct Bits<2> {
  using type = unsigned short;
};
template <>
struct Bits<4> {
  using type = unsigned;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};

// One access for a whole, aligned vector.
template <typename T, int n = Vector<T>::size>
__device__ __forceinline__ Vector<T, n> load_vector(const T* address) {
  const auto bits = *reinterpret_cast<const typename Bits<n * sizeof(T)>::type*>(address);
  Vector<T, n> x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
template <typename T, int n>
__device__ __forceinline__ void store_vector(T* address, const Vector<T, n>& x) {
  typename Bits<n * sizeof(T)>::type bits;
  memcpy(&bits, &x, sizeof(x));
  *reinterpret_cast<decltype(bits)*>(address) = bits;
}
// The same in global memory, where the compiler would split the assignment of a uint4 in four.
template <typename T, int n>
__device__ __forceinline__ void store_global(T* address, const Vector<T, n>& x) {
  typename Bits<n * sizeof(T)>::type bits;
  memcpy(&bits, &x, sizeof(x));
  __stwb(reinterpret_cast<decltype(bits)*>(address), bits);
}

// The 16 bytes at an address that is `shift` > 0 elements past an aligned one, from the two aligned vectors there.
template <typename T>
__device__ __forceinline__ Vector<T> load_shifted(const T* address, int shift) {
  const Vector<T> low = load_vector(address - shift), high = load_vector(address - shift + Vector<T>::size);
  unsigned words[8];
  memcpy(words, &low, sizeof(low));
  memcpy(words + 4, &high, sizeof(high));
  const int bytes = shift * static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < 6; i++) words[i] = bytes & 8 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; i++) words[i] = bytes & 4 ? words[i + 1] : words[i];
  if (sizeof(T) < 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = __funnelshift_r(words[i], words[i + 1], bytes % 4 * 8);
  }
  Vector<T> x;
  memcpy(&x, words, sizeof(x));
  return x;
}

// `count` neighbours in memory as aligned vectors, whatever the address: the first and the last vector may be partial.
template <typename T>
struct Span {
  static constexpr int V = Vector<T>::size;
  int head, count, vectors;
  __device__ __forceinline__ Span(const T* address, int count)
      : head(misalignment(address)), count(count), vectors((head + count + V - 1) / V) {}
  __device__ __forceinline__ Span(int count) : head(0), count(count), vectors((count + V - 1) / V) {}
  __device__ __forceinline__ int first(int vector) const { return vector * V - head; }  // element; may be negative
  __device__ __forceinline__ bool whole(int first) const { return first >= 0 && first + V <= count; }
  __device__ __forceinline__ bool holds(int element) const { return element >= 0 && element < count; }
};

// ---- rows ----------------------------------------------------------------------------------------------------------

struct Place {
  int64_t i0, i1, i2;
};

__device__ __forceinline__ int64_t divide(int64_t n, int64_t d) {
  if (((n | d) >> 32) == 0) return static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
  return n / d;
}

__device__ __forceinline__ Place place(int64_t row, const Rows& rows) {
  if (rows.levels == 1) return {0, 0, row};
  const int64_t outer = divide(row, rows.inner);
  const int64_t i2 = row - outer * rows.inner;
  if (rows.levels == 2) return {0, outer, i2};
  const int64_t i0 = divide(outer, rows.middle);
  return {i0, outer - i0 * rows.middle, i2};
}

__device__ __forceinline__ int64_t offset(const Place& at, const Steps& strides) {
  return at.i0 * strides.s0 + at.i1 * strides.s1 + at.i2 * strides.s2;
}

// How the rows are cut into tiles: into tiles of `rows` and a rest, or each `run` of them (an image) into equal tiles
// of at most `rows`.
struct Tiling {
  int64_t run, of_run, count;
  int rows;
  __device__ __forceinline__ Tiling(int64_t all, int rows)
      : run(all), of_run(divide(all + rows - 1, rows)), count(of_run), rows(rows) {}
  __device__ __forceinline__ Tiling(int64_t all, int64_t run, int rows)
      : run(run),
        of_run(divide(run + rows - 1, rows)),
        count(divide(all, run) * of_run),
        rows(static_cast<int>(divide(run + of_run - 1, of_run))) {}
  // The tile's first row, and how many it has.
  __device__ __forceinline__ int64_t first(int64_t tile, int& size) const {
    const int64_t which = divide(tile, of_run), start = (tile - which * of_run) * rows;
    size = static_cast<int>(min(static_cast<int64_t>(rows), run - start));
    return which * run + start;
  }
};

// A tile's labels: a class, or one of these.
constexpr int kIgnored = -1, kBad = -2, kElsewhere = -3;  // of another slice, or ignored

// Which rows a tile of the rows regime has, and which lanes.
struct Group {
  int lanes, lane, number, rows_per_group, rows_per_tile;
  __device__ __forceinline__ explicit Group(const Work& work)
      : lanes(1 << work.lane_bits),
        lane(static_cast<int>(threadIdx.x) & (lanes - 1)),
        number(static_cast<int>(threadIdx.x) >> work.lane_bits),
        rows_per_group(work.rows_per_group),
        rows_per_tile((kRowsThreads >> work.lane_bits) * work.rows_per_group) {}
};

// ---- tiles of the flat regime ----------------------------------------------------------------------------------

// A flat tile in shared memory, from `shared + head` on: with the head of either side its 16-byte vectors are those of
// that side in global memory.
template <typename T>
__device__ __forceinline__ void load_flat(const T* source, int count, T* shared, int head) {
  const Span<T> span(source, count);
#pragma unroll 4
  for (int v = threadIdx.x; v < span.vectors; v += kFlatThreads) {
    const int first = span.first(v);
    if (span.whole(first)) {
      const Vector<T> x = load_vector(source + first);
      if (span.head == head) {
        store_vector(shared + v * span.V, x);
      } else {
#pragma unroll
        for (int k = 0; k < span.V; k++) shared[head + first + k] = x.at[k];
      }
    } else {
      for (int e = max(first, 0); e < min(first + span.V, count); e++) shared[head + e] = source[e];
    }
  }
}

// The way back, from where the vectors are those of the destination.
template <typename T>
__device__ __forceinline__ void store_flat(T* destination, int count, const T* shared) {
  const Span<T> span(destination, count);
#pragma unroll 4
  for (int v = threadIdx.x; v < span.vectors; v += kFlatThreads) {
    const int first = span.first(v);
    if (span.whole(first)) {
      store_global(destination + first, load_vector(shared + v * span.V));
    } else {
      for (int e = max(first, 0); e < min(first + span.V, count); e++) destination[e] = shared[span.head + e];
    }
  }
}

// ---- tiles of the planes regime ------------------------------------------------------------------------------------

// `K` classes of a tile of neighbouring rows in shared memory, kPlaneElements for each class; a thread owns the rows
// threadIdx.x + r * kPlanesThreads, r < kOwn.
template <typename T>
struct Planes {
  static constexpr int V = Vector<T>::size, K = V, kRows = kPlaneElements - V, kOwn = kPlaneElements / kPlanesThreads;
  static constexpr int kVectors = kPlaneElements / V, kSteps = K * kVectors / kPlanesThreads;
  T at[K][kPlaneElements];

  // Rows `source[k * stride + (0 .. count)]` of classes k < classes; `heads(k)` is where the class begins. The first
  // and the last vector may have neighbours, of which there are `before` and `behind`.
  template <typename Heads>
  __device__ __forceinline__ void load(const T* source, int64_t stride, int classes, int count, int64_t before,
                                       int64_t behind, const Heads& heads) {
    Vector<T> x[kSteps];
    const auto whole = [&](int first) { return first + before >= 0 && first + V <= count + behind; };
    const auto step = [&](int i, const auto& visit) {
      const int index = i * kPlanesThreads + threadIdx.x, k = index / kVectors;
      if (k >= classes) return;
      const T* row = source + k * stride;
      const Span<T> span(row, count);
      const int v = index % kVectors;
      if (v < span.vectors) visit(k, row, span, span.first(v));
    };
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      step(i, [&](int, const T* row, const Span<T>& span, int first) {
        if (whole(first)) x[i] = load_vector(row + first);
      });
    }
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      step(i, [&](int k, const T* row, const Span<T>& span, int first) {
        const int head = heads(k);
        if (!whole(first)) {
          for (int e = max(first, 0); e < min(first + V, count); e++) at[k][head + e] = row[e];
        } else if (span.head == head) {
          store_vector(&at[k][head + first], x[i]);
        } else {
#pragma unroll
          for (int e = 0; e < V; e++) {
            if (span.holds(first + e)) at[k][head + first + e] = x[i].at[e];
          }
        }
      });
    }
  }
  // The way back; every class begins where the vectors of its destination want it.
  __device__ __forceinline__ void store(T* destination, int64_t stride, int classes, int count) const {
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      const int index = i * kPlanesThreads + threadIdx.x, k = index / kVectors;
      if (k >= classes) break;
      T* row = destination + k * stride;
      const Span<T> span(row, count);
      const int first = span.first(index % kVectors);
      if (span.whole(first)) {
        store_global(row + first, load_vector(&at[k][span.head + first]));
      } else {
        for (int e = max(first, 0); e < min(first + V, count); e++) row[e] = at[k][span.head + e];
      }
    }
  }
};

// A thread owns the row `shared[0 .. classes)`, and starts at a class that keeps the threads of a warp in different
// banks: visit(j, z_j) for all classes.
template <typename T, typename Visit>
__device__ __forceinline__ void for_classes(T* shared, int classes, const Visit& visit) {
  constexpr int kBankElements = 128 / sizeof(T);
  int j = static_cast<int>(threadIdx.x) * classes / kBankElements % classes;
  for (int k = 0; k < classes; k++) {
    visit(j, shared[j]);
    j = j + 1 == classes ? 0 : j + 1;
  }
}

// Calls launch(zero of the element type, number of exponentials), for what has kernels.
template <typename Function>
cudaError_t with_kernel(const Launch& launch, const Function& function) {
  const auto terms = [&](auto zero) {
    return launch.exponentials == 1 ? function(zero, std::integral_constant<int, 1>())
                                    : function(zero, std::integral_constant<int, 2>());
  };
  switch (launch.element) {
    case Element::kHalf:
      return terms(__half());
    case Element::kBFloat16:
      return terms(__nv_bfloat16());
    case Element::kFloat:
      return terms(float());
    default:
      return function(double(), std::integral_constant<int, 2>());
  }
}

}  // namespace cuda
}  // namespace lmf
