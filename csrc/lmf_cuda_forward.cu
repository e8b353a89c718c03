// The forward kernels: each tile of rows goes through three phases, the labels, the sums of eq. 1 (which differ from
// regime to regime), and with one thread a row the loss and the statistics of eq. 2 to 7. One launch, sums over all
// rows included: the last block to arrive adds what each block stored.
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

// What rows add to the reductions.
enum { kLdam, kFocal, kWeight, kKept, kTotals };

__device__ __forceinline__ int read_label(const ForwardParams& p, int64_t row) {
  const int64_t y = p.target[offset(place(row, p.work.rows), p.target_strides)];
  if (y == p.ignore_index) return kIgnored;
  return y >= 0 && y < p.work.classes ? static_cast<int>(y) : kBad;
}

// Loss and statistics of one row: eq. 2 to 7.
template <typename A, int n>
__device__ __forceinline__ void finish_row(const ForwardParams& p, int64_t row, int label, const Sums<A, n>& sums,
                                           A z_y, A (&totals)[kTotals]) {
  using Math = ScalarMath<A>;
  const bool counts = label != kIgnored, valid = label >= 0;
  const Options<A> options{static_cast<A>(p.alpha), static_cast<A>(p.beta), static_cast<A>(p.gamma),
                           static_cast<A>(p.work.s)};
  const Statistics<Math> statistics{sums.m, sums.t[0], sums.t[n - 1], z_y};
  const A poison = label == kBad ? std::numeric_limits<A>::quiet_NaN() : A(0);
  Term<Math> focal{0, 0, 0}, ldam{0, 0, 0};
  A w_ldam = valid ? A(1) : A(0);
  if (valid && p.ldam_weight) w_ldam = load_table<A>(p.ldam_weight, p.tables[1], label);
  if (p.work.focal) {
    focal = {poison, poison, poison};
    if (valid) {
      const A w_focal = p.focal_weight ? load_table<A>(p.focal_weight, p.tables[2], label) : A(1);
      focal = focal_term<Math>(statistics, false, w_focal, options);
    }
  }
  if (p.work.ldam) {
    ldam = {poison, poison, poison};
    if (valid) {
      const A margin = p.margins ? load_table<A>(p.margins, p.tables[0], label) : A(0);
      ldam = ldam_term<Math>(statistics, false, margin, w_ldam, options);
    }
  }
  A* stats = static_cast<A*>(p.stats) + row;
  const int64_t rows = p.work.rows.count;
  stats[0] = sums.m;
  stats[rows] = focal.c;
  stats[2 * rows] = ldam.c;
  stats[3 * rows] = focal.g;
  stats[4 * rows] = ldam.g;
  if (p.reduction == 0) {
    static_cast<A*>(p.loss)[row] = options.alpha * ldam.loss + options.beta * focal.loss;
  }
  totals[kLdam] += ldam.loss;
  totals[kFocal] += focal.loss;
  totals[kWeight] += w_ldam;
  totals[kKept] += counts ? A(1) : A(0);
}

// What a term that is off adds is not looked at.
template <typename A>
__device__ __forceinline__ A weighted_loss(const ForwardParams& p, A ldam, A focal) {
  A loss = 0;
  if (p.work.ldam) loss += static_cast<A>(p.alpha) * ldam;
  if (p.work.focal) loss += static_cast<A>(p.beta) * focal;
  return loss;
}

// The loss from the sums over all rows.
template <typename A>
__device__ __forceinline__ void store_loss(const ForwardParams& p, const A (&totals)[kTotals]) {
  A ldam = totals[kLdam], focal = totals[kFocal];
  if (p.reduction == 1) {
    const A weight = p.ldam_normalizer ? load_table<A>(p.ldam_normalizer, p.tables[3], 0) : totals[kWeight];
    const A kept = p.focal_normalizer ? load_table<A>(p.focal_normalizer, p.tables[4], 0) : totals[kKept];
    static_cast<A*>(p.denominators)[0] = weight;
    static_cast<A*>(p.denominators)[1] = kept;
    ldam /= weight;
    focal /= kept;
  }
  *static_cast<A*>(p.loss) = weighted_loss(p, ldam, focal);
}

// The sums over all rows from those of each thread.
template <int threads, typename A>
__device__ __forceinline__ void reduce_totals(const ForwardParams& p, A (&totals)[kTotals]) {
  __shared__ A scratch[threads / kWarp * kTotals];
  const int64_t blocks = gridDim.x;
  A* partials = static_cast<A*>(p.partials);
  block_sum<threads>(totals, scratch);
  if (blocks > 1) {
    const bool sum = p.reduction == 2;  // the loss alone
    const int words = sum ? 1 : kKept;
    Counter kept = static_cast<Counter>(totals[kKept]);
    if (sum) totals[0] = weighted_loss(p, totals[kLdam], totals[kFocal]);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kKept; i++) {
        if (i < words) partials[i * blocks + blockIdx.x] = totals[i];
      }
    }
    if (!arrive_last(p.counter, kept)) return;
#pragma unroll
    for (int i = 0; i < kKept; i++) {
      totals[i] = 0;
      if (i >= words) continue;
      for (int64_t block = threadIdx.x; block < blocks; block += threads) {
        totals[i] += load_fresh(partials + i * blocks + block);
      }
    }
    block_sum<threads>(totals, scratch);
    totals[kKept] = static_cast<A>(kept);
    if (sum) {
      if (threadIdx.x == 0) *static_cast<A*>(p.loss) = totals[0];
      return;
    }
  }
  if (threadIdx.x == 0) store_loss(p, totals);
}

// Walks over the tiles of a block: load(row, count) and sum(row, count) are a regime's own.
template <int threads, typename A, int n, int rows, typename Load, typename Sum>
__device__ __forceinline__ void for_tiles(const ForwardParams& p, Tile<A, n, rows>& tile, const Rates<A, n>& rates,
                                          const Tiling& tiling, int parts, const Load& load, const Sum& sum) {
  A totals[kTotals] = {};
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
      finish_row(p, row + i, label, tile.get(i * parts, parts, rates), label >= 0 ? tile.z_y[i] : A(0), totals);
    }
    __syncthreads();
  }
  if (p.reduction != 0) reduce_totals<threads>(p, totals);
}

// ---- few classes ---------------------------------------------------------------------------------------------------

template <typename T, int n>
__global__ void __launch_bounds__(kFlatThreads, sizeof(T) == 8 ? 4 : 7) forward_flat(const ForwardParams p) {
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
  for_tiles<kFlatThreads>(p, tile, rates, Tiling(p.work.rows.count, kFlatThreads), 1, load, sum);
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

// Rows that are split over blocks: the last block to arrive puts them together.
template <typename T, int n, typename A>
__device__ __forceinline__ void forward_split(const ForwardParams& p, Tile<A, n, kTileRows>& tile,
                                              const Rates<A, n>& rates) {
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
  const int classes = label >= 0 ? min(work.chunk, work.classes - first) : 0;
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
  if (!arrive_last(p.counter, none)) return;

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
  A totals[kTotals] = {};
  for (int i = threadIdx.x; i < rows; i += kRowsThreads) {
    const int y = read_label(p, i);
    const T* logits = static_cast<const T*>(p.logits) + offset(place(i, work.rows), p.strides);
    const A z_y = y >= 0 ? widen(logits[y * p.stride_c]) : A(0);  // by whichever block: gathered again
    finish_row(p, i, y, tile.get(i, 1, rates), z_y, totals);
  }
  if (p.reduction == 0) return;
  __shared__ A scratch[kWarps * kTotals];
  block_sum<kRowsThreads>(totals, scratch);
  if (threadIdx.x == 0) store_loss(p, totals);
}

template <typename T, int n>
__global__ void __launch_bounds__(kRowsThreads, sizeof(T) == 8 ? 1 : 2) forward_rows(const ForwardParams p) {
  using A = Acc<T>;
  __shared__ Tile<A, n, kTileRows> tile;
  const Rates<A, n> rates(p.work);
  if (p.work.chunks > 1) {
    forward_split<T>(p, tile, rates);
    return;
  }
  const Group group(p.work);
  const int parts = max(1, group.lanes / kWarp);
  const auto sum = [&](int64_t row, int count) {
    for (int k = 0; k < group.rows_per_group; k++) {
      const int i = group.number * group.rows_per_group + k;
      const int y = i < count ? tile.label[i] : kIgnored;
      const int classes = y >= 0 ? p.work.classes : 0;  // what is not looked at is not read
      const T* z = static_cast<const T*>(p.logits) + offset(place(row + min(i, count - 1), p.work.rows), p.strides);
      Sums<A, n> sums = lane_sums(z, p.stride_c, classes, y, group.lane, group.lanes, rates, tile.z_y + i);
      sums.combine(min(group.lanes, kWarp), rates);
      if (i < count && group.lane % kWarp == 0) tile.put(i * parts + group.lane / kWarp, sums);
    }
  };
  const Tiling tiling(p.work.rows.count, group.rows_per_tile);
  for_tiles<kRowsThreads>(p, tile, rates, tiling, parts, [](int64_t, int) {}, sum);
}

// ---- neighbouring rows are neighbours in memory
// ----------------------------------------------------------------------

template <typename T, int V, int n>
__global__ void __launch_bounds__(kPixelsThreads, 4) forward_pixels(const ForwardParams p) {
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
  for_tiles<kPixelsThreads>(p, tile, rates, Tiling(p.work.rows.count, kRows), 1, [](int64_t, int) {}, sum);
}

template <typename T, int n>
__global__ void __launch_bounds__(kPlanesThreads, sizeof(T) == 8 ? 1 : 2) forward_planes(const ForwardParams p) {
  using A = Acc<T>;
  constexpr int K = Planes<T>::K, R = Planes<T>::kOwn;
  __shared__ Tile<A, n, kPlaneElements> tile;
  __shared__ alignas(kVectorBytes) Planes<T> planes;
  const Rates<A, n> rates(p.work);
  const int classes = p.work.classes;
  const auto sum = [&](int64_t row, int count) {
    const Place at = place(row, p.work.rows);
    const int64_t before = at.i2, behind = p.work.rows.inner - before - count;
    const T* z = static_cast<const T*>(p.logits) + offset(at, p.strides);
    Sums<A, n> sums[R];
    for (int j = 0; j < classes; j += K) {
      const auto head = [&](int k) { return misalignment(z + (j + k) * p.stride_c); };
      planes.load(z + j * p.stride_c, p.stride_c, min(K, classes - j), count, before, behind, head);
      __syncthreads();
#pragma unroll
      for (int r = 0; r < R; r++) {
        const int i = threadIdx.x + r * kPlanesThreads;
        if (i >= count) break;
        const int target = tile.label[i] - j;
        A value[K];
#pragma unroll
        for (int k = 0; k < K; k++) {
          value[k] = j + k < classes ? widen(planes.at[k][head(k) + i]) : -infinity<A>();
          if (k == target) {
            tile.z_y[i] = value[k];
            value[k] = -infinity<A>();
          }
        }
        sums[r].add(value, rates, j == 0);
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int i = threadIdx.x + r * kPlanesThreads;
      if (i < count) tile.put(i, sums[r]);
    }
  };
  const Tiling tiling(p.work.rows.count, p.work.rows.inner, Planes<T>::kRows);
  for_tiles<kPlanesThreads>(p, tile, rates, tiling, 1, [](int64_t, int) {}, sum);
}

cudaError_t launch_forward(const Launch& launch, const ForwardParams& p, cudaStream_t stream) {
  return with_kernel(launch, [&](auto zero, auto exponentials) {
    using T = decltype(zero);
    constexpr int n = decltype(exponentials)::value;
    if (launch.regime == Regime::kFlat) {
      forward_flat<T, n><<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(p);
    } else if (launch.regime == Regime::kRows) {
      forward_rows<T, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    } else if (launch.regime == Regime::kPlanes) {
      forward_planes<T, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    } else if (launch.width == 1) {
      forward_pixels<T, 1, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    } else if constexpr (sizeof(T) < 8) {
      forward_pixels<T, Vector<T>::size, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace cuda
}  // namespace lmf
