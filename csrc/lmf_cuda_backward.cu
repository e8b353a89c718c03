// The backward kernels: a stream over the logits that evaluates eq. 8. A tile's statistics are read once, by one thread
// a row, into shared memory. The gradient may lie where the logits are: what is read of a tile belongs to the tile
// alone, and its reader writes it later.
#include "lmf_cuda.cuh"

namespace lmf {
namespace cuda {

constexpr int kNoGradient = -1;

// What eq. 8 needs of a row; n = 1: both terms have the same exponential.
template <typename A, int n>
struct RowGradient {
  int y;              // kNoGradient: the row's gradient is zero, and its logits are not looked at
  A m, k[n], grad_y;  // k = r c

  __device__ __forceinline__ A of(int j, A z_j, const A (&rate)[n]) const {
    const A d = z_j - m;
    A gradient = 0;
#pragma unroll
    for (int i = 0; i < n; i++) gradient += k[i] * exponential(d, rate[i]);
    return j == y ? grad_y : gradient;
  }
};

template <typename A, int n, int rows>
struct GradientTile {
  int y[rows];
  A m[rows], k[n][rows], grad_y[rows];

  __device__ __forceinline__ void put(int i, const RowGradient<A, n>& row) {
    y[i] = row.y;
    m[i] = row.m;
#pragma unroll
    for (int term = 0; term < n; term++) k[term][i] = row.k[term];
    grad_y[i] = row.grad_y;
  }
  __device__ __forceinline__ RowGradient<A, n> get(int i) const {
    RowGradient<A, n> row;
    row.y = y[i];
    row.m = m[i];
#pragma unroll
    for (int term = 0; term < n; term++) row.k[term] = k[term][i];
    row.grad_y = grad_y[i];
    return row;
  }
};

// r * c, but 0 for c = 0: a term without gradient does not care for its denominator.
template <typename A>
__device__ __forceinline__ A times(A r, A c) {
  return c == A(0) ? A(0) : r * c;
}

template <typename A, int n>
__device__ __forceinline__ RowGradient<A, n> read_row(const BackwardParams& p, int64_t row) {
  const Work& work = p.work;
  const Place at = place(row, work.rows);
  const A* saved = static_cast<const A*>(p.saved) + row;
  const int64_t rows = work.rows.count;
  A r1 = static_cast<const A*>(p.grad_output)[p.reduction == 0 ? offset(at, p.outer_strides) : 0];
  A r2 = r1;
  if (p.reduction == 1) {
    r1 /= static_cast<const A*>(p.denominators)[1];
    r2 /= static_cast<const A*>(p.denominators)[0];
  }
  A c1 = 0, c2 = 0, grad_y = 0;
  if (work.focal) {
    c1 = saved[rows];
    grad_y -= times(r1, saved[3 * rows]);
  }
  if (work.ldam) {
    c2 = saved[2 * rows];
    grad_y -= times(r2, saved[4 * rows]);
  }
  const int64_t y = p.target[offset(at, p.target_strides)];
  RowGradient<A, n> result;
  result.m = saved[0];
  result.grad_y = grad_y;
  result.k[0] = n == 1 ? times(r1, c1) + times(r2, c2) : times(r1, c1);
  if (n == 2) result.k[n - 1] = times(r2, c2);
  result.y = y >= 0 && y < work.classes ? static_cast<int>(y) : kBad;
  if (c1 == A(0) && c2 == A(0)) result.y = kNoGradient;
  return result;
}

// Walks over the tiles of a block; load(row, count) and stream(row, count) are a regime's own.
template <int threads, typename A, int n, int rows, typename Load, typename Stream>
__device__ __forceinline__ void for_tiles(const BackwardParams& p, GradientTile<A, n, rows>& tile, const Tiling& tiling,
                                          const Load& load, const Stream& stream) {
  const int64_t blocks = gridDim.x / p.work.chunks;
  for (int64_t t = blockIdx.x / p.work.chunks; t < tiling.count; t += blocks) {
    int count;
    const int64_t row = tiling.first(t, count);
    load(row, count);
    for (int i = threadIdx.x; i < count; i += threads) tile.put(i, read_row<A, n>(p, row + i));
    __syncthreads();
    stream(row, count);
    __syncthreads();
  }
}

// ---- few classes ---------------------------------------------------------------------------------------------------

template <typename T, int n>
__global__ void __launch_bounds__(kFlatThreads, 7) backward_flat(const BackwardParams p) {
  using A = Acc<T>;
  extern __shared__ uint4 dynamic[];
  __shared__ GradientTile<A, n, kFlatThreads> tile;
  T* shared = reinterpret_cast<T*>(dynamic);
  const int classes = p.work.classes;
  const Rates<A, n> rates(p.work);
  int head = 0;
  const auto load = [&](int64_t row, int count) {
    head = misalignment(static_cast<const T*>(p.grad_logits) + row * classes);
    load_flat(static_cast<const T*>(p.logits) + row * classes, count * classes, shared, head);
  };
  const auto stream = [&](int64_t first_row, int count) {
    if (static_cast<int>(threadIdx.x) < count) {
      const RowGradient<A, n> row = tile.get(threadIdx.x);
      T* z = shared + head + threadIdx.x * classes;
      for_classes(z, classes, [&](int j, T z_j) {
        z[j] = narrow<T>(row.y == kNoGradient ? A(0) : row.of(j, widen(z_j), rates.rate));
      });
    }
    __syncthreads();
    store_flat(static_cast<T*>(p.grad_logits) + first_row * classes, count * classes, shared);
  };
  for_tiles<kFlatThreads>(p, tile, Tiling(p.work.rows.count, kFlatThreads), load, stream);
}

// ---- neighbouring classes are neighbours in memory
// -------------------------------------------------------------------

// One vector of gradients.
template <typename T, int n, typename A = Acc<T>>
__device__ __forceinline__ Vector<T> gradients(const Vector<T>& z, int first, const RowGradient<A, n>& row,
                                               const A (&rate)[n]) {
  Vector<T> gradient;
#pragma unroll
  for (int k = 0; k < Vector<T>::size; k++) gradient.at[k] = narrow<T>(row.of(first + k, widen(z.at[k]), rate));
  return gradient;
}

template <typename T, int n>
__global__ void __launch_bounds__(kRowsThreads, 2) backward_rows(const BackwardParams p) {
  using A = Acc<T>;
  constexpr int V = Vector<T>::size, U = 4;  // vectors in flight
  __shared__ GradientTile<A, n, kTileRows> tile;
  const Rates<A, n> rates(p.work);
  const Group group(p.work);
  const int first_class = static_cast<int>(blockIdx.x % p.work.chunks) * p.work.chunk;
  const int classes = min(p.work.chunk, p.work.classes - first_class);
  const bool dense = p.stride_c == 1, dense_grad = p.grad_stride_c == 1;

  const auto stream = [&](int64_t first_row, int count) {
    for (int i = group.number * group.rows_per_group; i < min(count, (group.number + 1) * group.rows_per_group); i++) {
      RowGradient<A, n> row = tile.get(i);
      const bool zero = row.y == kNoGradient;
      row.y -= first_class;
      const Place at = place(first_row + i, p.work.rows);
      const T* z = static_cast<const T*>(p.logits) + offset(at, p.strides) + first_class * p.stride_c;
      T* grad = static_cast<T*>(p.grad_logits) + offset(at, p.grad_strides) + first_class * p.grad_stride_c;
      const Span<T> span = dense_grad ? Span<T>(grad, classes) : Span<T>(classes);
      // Elements from an aligned vector of logits to the vector that has those of a vector of gradients.
      const int shift = dense ? (misalignment(z) - span.head) & (V - 1) : 0;
      for (int v = group.lane; v < span.vectors; v += group.lanes * U) {
        Vector<T> x[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
          const int first = span.first(v + u * group.lanes);
          if (!zero && dense && span.whole(first - shift) && (shift == 0 || span.whole(first - shift + V))) {
            x[u] = shift == 0 ? load_vector(z + first) : load_shifted(z + first, shift);
          } else {
#pragma unroll
            for (int k = 0; k < V; k++) {
              x[u].at[k] = !zero && span.holds(first + k) ? z[(first + k) * p.stride_c] : narrow<T>(0);
            }
          }
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
          const int first = span.first(v + u * group.lanes);
          if (first >= classes) break;
          if (!zero) x[u] = gradients<T, n>(x[u], first, row, rates.rate);
          if (dense_grad && span.whole(first)) {
            store_global(grad + first, x[u]);
          } else {
#pragma unroll
            for (int k = 0; k < V; k++) {
              if (span.holds(first + k)) grad[(first + k) * p.grad_stride_c] = x[u].at[k];
            }
          }
        }
      }
    }
  };
  for_tiles<kRowsThreads>(p, tile, Tiling(p.work.rows.count, group.rows_per_tile), [](int64_t, int) {}, stream);
}

// ---- neighbouring rows are neighbours in memory
// ----------------------------------------------------------------------

template <typename T, int V, int n>
__global__ void __launch_bounds__(kPixelsThreads, 4) backward_pixels(const BackwardParams p) {
  using A = Acc<T>;
  constexpr int K = V * sizeof(T) < 8 ? 8 : 4;  // classes in flight
  constexpr int kRows = kPixelsThreads * V;
  __shared__ GradientTile<A, n, kRows> tile;
  const Rates<A, n> rates(p.work);
  const int classes = p.work.classes;
  const auto stream = [&](int64_t first_row, int count) {
    const int i = threadIdx.x * V;
    if (i >= count) return;
    const Place at = place(first_row + i, p.work.rows);
    const T* z = static_cast<const T*>(p.logits) + offset(at, p.strides);
    T* grad = static_cast<T*>(p.grad_logits) + offset(at, p.grad_strides);
    RowGradient<A, n> row[V];
#pragma unroll
    for (int v = 0; v < V; v++) row[v] = tile.get(i + v);
    for (int j = 0; j < classes; j += K) {
      Vector<T, V> x[K];
#pragma unroll
      for (int k = 0; k < K; k++) {
        if (j + k >= classes) break;
        x[k] = load_vector<T, V>(z + (j + k) * p.stride_c);
      }
#pragma unroll
      for (int k = 0; k < K; k++) {
        if (j + k >= classes) break;
#pragma unroll
        for (int v = 0; v < V; v++) {
          const A gradient = row[v].of(j + k, widen(x[k].at[v]), rates.rate);
          x[k].at[v] = narrow<T>(row[v].y == kNoGradient ? A(0) : gradient);
        }
        store_global(grad + (j + k) * p.grad_stride_c, x[k]);
      }
    }
  };
  for_tiles<kPixelsThreads>(p, tile, Tiling(p.work.rows.count, kRows), [](int64_t, int) {}, stream);
}

template <typename T, int n>
__global__ void __launch_bounds__(kPlanesThreads, sizeof(T) == 8 ? 1 : 2) backward_planes(const BackwardParams p) {
  using A = Acc<T>;
  constexpr int K = Planes<T>::K, R = Planes<T>::kOwn;
  __shared__ GradientTile<A, n, kPlaneElements> tile;
  __shared__ alignas(kVectorBytes) Planes<T> planes;
  const Rates<A, n> rates(p.work);
  const int classes = p.work.classes;
  const auto stream = [&](int64_t first_row, int count) {
    const Place at = place(first_row, p.work.rows);
    const T* z = static_cast<const T*>(p.logits) + offset(at, p.strides);
    T* grad = static_cast<T*>(p.grad_logits) + offset(at, p.grad_strides);
    const bool in_place = p.grad_logits == p.logits;  // where neighbours may already be gradients
    const int64_t before = in_place ? 0 : at.i2, behind = in_place ? 0 : p.work.rows.inner - at.i2 - count;
    RowGradient<A, n> row[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int i = threadIdx.x + r * kPlanesThreads;
      if (i < count) row[r] = tile.get(i);
    }
    for (int j = 0; j < classes; j += K) {
      const auto head = [&](int k) { return misalignment(grad + (j + k) * p.grad_stride_c); };
      planes.load(z + j * p.stride_c, p.stride_c, min(K, classes - j), count, before, behind, head);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < K; k++) {
        if (j + k >= classes) break;
        T* plane = planes.at[k] + head(k);
#pragma unroll
        for (int r = 0; r < R; r++) {
          const int i = threadIdx.x + r * kPlanesThreads;
          if (i >= count) break;
          const A gradient = row[r].of(j + k, widen(plane[i]), rates.rate);
          plane[i] = narrow<T>(row[r].y == kNoGradient ? A(0) : gradient);
        }
      }
      __syncthreads();
      planes.store(grad + j * p.grad_stride_c, p.grad_stride_c, min(K, classes - j), count);
      __syncthreads();
    }
  };
  const Tiling tiling(p.work.rows.count, p.work.rows.inner, Planes<T>::kRows);
  for_tiles<kPlanesThreads>(p, tile, tiling, [](int64_t, int) {}, stream);
}

cudaError_t launch_backward(const Launch& launch, const BackwardParams& p, cudaStream_t stream) {
  return with_kernel(launch, [&](auto zero, auto exponentials) {
    using T = decltype(zero);
    constexpr int n = decltype(exponentials)::value;
    if (launch.regime == Regime::kFlat) {
      backward_flat<T, n><<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(p);
    } else if (launch.regime == Regime::kRows) {
      backward_rows<T, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    } else if (launch.regime == Regime::kPlanes) {
      backward_planes<T, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    } else if (launch.width == 1) {
      backward_pixels<T, 1, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    } else if constexpr (sizeof(T) < 8) {
      backward_pixels<T, Vector<T>::size, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace cuda
}  // namespace lmf
