// The walks over the logits that forward and statistics share: each tile of rows goes through three phases, the labels,
// the sums of eq. 1 (which differ from regime to regime), and with one thread a row whatever follows from them.
//
// What has such kernels says for its parameters what a label is (read_label) and which rows are read (reads); its
// finish(row, label, sums, z_y) gets every row once, with z_y = 0 where there is no target.
#pragma once

#include "lmf_cuda.cuh"
#include "reduce.cuh"

namespace lmf {
namespace cuda {

// m, and t1 and t2 of eq. 1 or the one of them that is needed, over a part of a row's competitors.
template <typename A, int n>
struct Sums {
  A m = -infinity<A>();
  A t[n] = {};

  // What exponents are relative to: m, or 0 where nothing is finite (exp(-inf - 0) = 0, not NaN).
  static __device__ __forceinline__ A origin(A m) { return m == -infinity<A>() ? A(0) : m; }

  __device__ __forceinline__ void move_to(A top, const Rates<A, n>& rates) {
    const A d = m - origin(top);
#pragma unroll
    for (int i = 0; i < n; i++) t[i] *= exponential(d, rates.rate[i]);
    m = top;
  }
  // Takes in competitors. A NaN that the maximum drops stays in t.
  template <int count>
  __device__ __forceinline__ void add(const A (&z)[count], const Rates<A, n>& rates, bool first) {
    A top = m;
#pragma unroll
    for (int k = 0; k < count; k++) top = fmax(top, z[k]);
    if (!first) move_to(top, rates);
    m = top;
    const A from = origin(top);
#pragma unroll
    for (int k = 0; k < count; k++) {
      const A d = z[k] - from;
#pragma unroll
      for (int i = 0; i < n; i++) t[i] += exponential(d, rates.rate[i]);
    }
  }
  // The lanes of a row together, up to a whole warp.
  __device__ __forceinline__ void combine(int lanes, const Rates<A, n>& rates) {
    A top = m;
    for (int bit = lanes / 2; bit > 0; bit /= 2) top = fmax(top, from_lane(top, bit));
    move_to(top, rates);
    for (int bit = lanes / 2; bit > 0; bit /= 2) {
#pragma unroll
      for (int i = 0; i < n; i++) t[i] += from_lane(t[i], bit);
    }
  }
};

// A tile of rows in shared memory; a row's sums may be in several parts.
template <typename A, int n, int rows>
struct Tile {
  int label[rows];
  A z_y[rows];
  A m[rows];
  A t[n][rows];

  __device__ __forceinline__ void put(int slot, const Sums<A, n>& sums) {
    m[slot] = sums.m;
#pragma unroll
    for (int i = 0; i < n; i++) t[i][slot] = sums.t[i];
  }
  __device__ __forceinline__ Sums<A, n> get(int slot, int parts, const Rates<A, n>& rates) const {
    Sums<A, n> sums;
    for (int part = slot; part < slot + parts; part++) sums.m = fmax(sums.m, m[part]);
    for (int part = slot; part < slot + parts; part++) {
      const A d = m[part] - Sums<A, n>::origin(sums.m);
#pragma unroll
      for (int i = 0; i < n; i++) sums.t[i] += t[i][part] * exponential(d, rates.rate[i]);
    }
    return sums;
  }
};

// Walks over the tiles of a block: load(row, count) and sum(row, count) are a regime's own.
template <int threads, typename Params, typename A, int n, int rows, typename Load, typename Sum, typename Finish>
__device__ __forceinline__ void for_tiles(const Params& p, Tile<A, n, rows>& tile, const Rates<A, n>& rates,
                                          const Tiling& tiling, int parts, const Load& load, const Sum& sum,
                                          const Finish& finish) {
  for (int64_t t = blockIdx.x; t < tiling.count; t += gridDim.x) {
    int count;
    const int64_t row = tiling.first(t, count);
    load(row, count);
    for (int i = threadIdx.x; i < count; i += threads) tile.label[i] = read_label(p, row + i);
    __syncthreads();
    sum(row, count);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += threads) {
      const int label = tile.label[i];
      finish(row + i, label, tile.get(i * parts, parts, rates), label >= 0 ? tile.z_y[i] : A(0));
    }
    __syncthreads();
  }
}

// ---- few classes ---------------------------------------------------------------------------------------------------

template <typename T, int n, typename Params, typename Finish>
__device__ __forceinline__ void flat_rows(const Params& p, const Finish& finish) {
  using A = Acc<T>;
  extern __shared__ uint4 dynamic[];
  __shared__ Tile<A, n, kFlatThreads> tile;
  T* logits = reinterpret_cast<T*>(dynamic);
  const int classes = p.work.classes;
  const Rates<A, n> rates(p.work);
  int head = 0;
  const auto load = [&](int64_t row, int count) {
    const T* source = static_cast<const T*>(p.logits) + row * classes;
    head = misalignment(source);
    load_flat(source, count * classes, logits, head);
  };
  const auto sum = [&](int64_t, int count) {
    const int i = threadIdx.x;
    if (i >= count) return;
    T* z = logits + head + i * classes;
    const int y = tile.label[i];
    Sums<A, n> sums;
    for_classes(z, classes, [&](int j, T z_j) { sums.m = j == y ? sums.m : fmax(sums.m, widen(z_j)); });
    const A origin = sums.origin(sums.m);
    for_classes(z, classes, [&](int j, T z_j) {
      const A d = j == y ? -infinity<A>() : widen(z_j) - origin;
#pragma unroll
      for (int term = 0; term < n; term++) sums.t[term] += exponential(d, rates.rate[term]);
    });
    tile.put(i, sums);
    if (y >= 0) tile.z_y[i] = widen(z[y]);
  };
  for_tiles<kFlatThreads>(p, tile, rates, Tiling(p.work.rows.count, kFlatThreads), 1, load, sum, finish);
}

// ---- neighbouring classes are neighbours in memory
// -------------------------------------------------------------------

// Classes that a lane keeps in registers.
template <typename T>
constexpr int kLaneVectors = sizeof(T) == 4 ? 8 : 4;

// A lane's part of the row z, of which it takes 16-byte vectors; stores z_y if it comes across it.
template <typename T, int n, typename A = Acc<T>>
__device__ __forceinline__ Sums<A, n> lane_sums(const T* z, int64_t stride, int classes, int y, int lane, int lanes,
                                                const Rates<A, n>& rates, A* z_y) {
  constexpr int V = Vector<T>::size, U = kLaneVectors<T>;
  const bool dense = stride == 1;
  const Span<T> span = dense ? Span<T>(z, classes) : Span<T>(classes);
  const int target = span.holds(y) ? y : -(1 << 30);  // the head of the first vector is not the row's
  Sums<A, n> sums;
  for (int v = lane; v < span.vectors; v += lanes * U) {
    Vector<T> x[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int first = span.first(v + u * lanes);
      if (dense && span.whole(first)) {
        x[u] = load_vector(z + first);
      } else {
#pragma unroll
        for (int k = 0; k < V; k++) {
          x[u].at[k] = span.holds(first + k) ? z[(first + k) * stride] : narrow<T>(-infinity<A>());
        }
      }
    }
    A value[U * V];
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int at = target - span.first(v + u * lanes);
#pragma unroll
      for (int k = 0; k < V; k++) value[u * V + k] = widen(x[u].at[k]);
      if (at >= 0 && at < V) {
#pragma unroll
        for (int k = 0; k < V; k++) {
          if (k == at) {
            *z_y = value[u * V + k];
            value[u * V + k] = -infinity<A>();
          }
        }
      }
    }
    sums.add(value, rates, v == lane);
  }
  return sums;
}

// Rows that are split over blocks: the last block to arrive, which finds true, puts them together.
template <typename T, typename Params, int n, typename A, typename Finish>
__device__ __forceinline__ bool split_rows(const Params& p, Tile<A, n, kTileRows>& tile, const Rates<A, n>& rates,
                                           const Finish& finish) {
  constexpr int kWarps = kRowsThreads / kWarp;
  const Work& work = p.work;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = blockIdx.x / work.chunks, blocks = gridDim.x;
  const int first = static_cast<int>(blockIdx.x % work.chunks) * work.chunk;
  A* partials = static_cast<A*>(p.partials);

  if (threadIdx.x == 0) tile.label[0] = read_label(p, row);
  __syncthreads();
  const int label = tile.label[0];
  const T* z = static_cast<const T*>(p.logits) + offset(place(row, work.rows), p.strides) + first * p.stride_c;
  const int classes = reads(p, label) ? min(work.chunk, work.classes - first) : 0;
  Sums<A, n> sums = lane_sums(z, p.stride_c, classes, label - first, threadIdx.x, kRowsThreads, rates, tile.z_y);
  sums.combine(kWarp, rates);
  if (lane == 0) tile.put(warp, sums);
  __syncthreads();
  if (threadIdx.x == 0) {
    sums = tile.get(0, kWarps, rates);
    partials[blockIdx.x] = sums.m;
#pragma unroll
    for (int i = 0; i < n; i++) partials[(1 + i) * blocks + blockIdx.x] = sums.t[i];
  }
  Counter none = 0;
  if (!arrive_last(p.counter, none)) return false;

  const int rows = static_cast<int>(work.rows.count);
  int lanes = 1;  // of a row: few iterations, each of which waits for memory
  while (lanes < min(work.chunks, kWarp)) lanes *= 2;
  for (int first_row = 0; first_row < rows; first_row += kRowsThreads / lanes) {
    const int i = first_row + static_cast<int>(threadIdx.x) / lanes;
    const int chunks = i < rows ? work.chunks : 0;
    Sums<A, n> all;
    for (int chunk = lane % lanes; chunk < chunks; chunk += lanes) {
      const A* part = partials + i * static_cast<int64_t>(work.chunks) + chunk;
      const A m = load_fresh(part);
      const A top = fmax(all.m, m);
      all.move_to(top, rates);
#pragma unroll
      for (int k = 0; k < n; k++) {
        all.t[k] += load_fresh(part + (1 + k) * blocks) * exponential(m - all.origin(top), rates.rate[k]);
      }
    }
    all.combine(lanes, rates);
    if (lane % lanes == 0 && i < rows) tile.put(i, all);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows; i += kRowsThreads) {
    const int y = read_label(p, i);
    const T* logits = static_cast<const T*>(p.logits) + offset(place(i, work.rows), p.strides);
    const A z_y = y >= 0 ? widen(logits[y * p.stride_c]) : A(0);  // by whichever block: gathered again
    finish(i, y, tile.get(i, 1, rates), z_y);
  }
  return true;
}

// Rows that a block has as a whole.
template <typename T, typename Params, int n, typename A, typename Finish>
__device__ __forceinline__ void whole_rows(const Params& p, Tile<A, n, kTileRows>& tile, const Rates<A, n>& rates,
                                           const Finish& finish) {
  const Group group(p.work);
  const int parts = max(1, group.lanes / kWarp);
  const auto sum = [&](int64_t row, int count) {
    for (int k = 0; k < group.rows_per_group; k++) {
      const int i = group.number * group.rows_per_group + k;
      const int y = i < count ? tile.label[i] : kIgnored;
      const int classes = i < count && reads(p, y) ? p.work.classes : 0;
      const T* z = static_cast<const T*>(p.logits) + offset(place(row + min(i, count - 1), p.work.rows), p.strides);
      Sums<A, n> sums = lane_sums(z, p.stride_c, classes, y, group.lane, group.lanes, rates, tile.z_y + i);
      sums.combine(min(group.lanes, kWarp), rates);
      if (i < count && group.lane % kWarp == 0) tile.put(i * parts + group.lane / kWarp, sums);
    }
  };
  const Tiling tiling(p.work.rows.count, group.rows_per_tile);
  for_tiles<kRowsThreads>(p, tile, rates, tiling, parts, [](int64_t, int) {}, sum, finish);
}

// ---- neighbouring rows are neighbours in memory
// ----------------------------------------------------------------------

template <typename T, int V, int n, typename Params, typename Finish>
__device__ __forceinline__ void pixel_rows(const Params& p, const Finish& finish) {
  using A = Acc<T>;
  constexpr int K = V * sizeof(T) < 8 ? 8 : 4;  // classes in flight
  constexpr int kRows = kPixelsThreads * V;
  __shared__ Tile<A, n, kRows> tile;
  const Rates<A, n> rates(p.work);
  const int classes = p.work.classes;
  const auto sum = [&](int64_t row, int count) {
    const int i = threadIdx.x * V;
    if (i >= count) return;
    const T* z = static_cast<const T*>(p.logits) + offset(place(row + i, p.work.rows), p.strides);
    Sums<A, n> sums[V];
    A z_y[V];
    int y[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
      y[v] = tile.label[i + v];
      z_y[v] = 0;
    }
    for (int j = 0; j < classes; j += K) {
      Vector<T, V> x[K];
#pragma unroll
      for (int k = 0; k < K; k++) {
        if (j + k < classes) {
          x[k] = load_vector<T, V>(z + (j + k) * p.stride_c);
        } else {
#pragma unroll
          for (int v = 0; v < V; v++) x[k].at[v] = narrow<T>(-infinity<A>());
        }
      }
#pragma unroll
      for (int v = 0; v < V; v++) {
        A value[K];
#pragma unroll
        for (int k = 0; k < K; k++) {
          value[k] = widen(x[k].at[v]);
          if (j + k == y[v]) {
            z_y[v] = value[k];
            value[k] = -infinity<A>();
          }
        }
        sums[v].add(value, rates, j == 0);
      }
    }
#pragma unroll
    for (int v = 0; v < V; v++) {
      tile.put(i + v, sums[v]);
      tile.z_y[i + v] = z_y[v];
    }
  };
  for_tiles<kPixelsThreads>(p, tile, rates, Tiling(p.work.rows.count, kRows), 1, [](int64_t, int) {}, sum, finish);
}

}  // namespace cuda
}  // namespace lmf
