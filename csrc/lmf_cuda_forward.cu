// The forward kernels: the sums of eq. 1, and with one thread a row the loss and the statistics of eq. 2 to 7. One
// launch, sums over all rows included: the last block to arrive adds what each block stored.
#include "lmf_cuda_sums.cuh"

namespace lmf {
namespace cuda {

// What rows add to the reductions.
enum { kLdam, kFocal, kWeight, kKept, kTotals };

__device__ __forceinline__ int read_label(const ForwardParams& p, int64_t row) {
  const int64_t y = p.target[offset(place(row, p.work.rows), p.target_strides)];
  if (y == p.ignore_index) return kIgnored;
  return y >= 0 && y < p.work.classes ? static_cast<int>(y) : kBad;
}

__device__ __forceinline__ bool reads(const ForwardParams&, int label) { return label >= 0; }

// Loss and statistics of one row: eq. 2 to 7.
template <typename A, int n>
__device__ __forceinline__ void finish_row(const ForwardParams& p, int64_t row, int label, const Sums<A, n>& sums,
                                           A z_y, A (&totals)[kTotals]) {
  using Math = ScalarMath<A>;
  const bool counts = label != kIgnored, valid = label >= 0;
  const Options<A> options{static_cast<A>(p.alpha), static_cast<A>(p.beta), static_cast<A>(p.gamma),
                           static_cast<A>(p.work.s)};
  const RowSums<Math> whole{sums.m, sums.t[0], sums.t[n - 1], z_y};
  const Gap<Math> gap(whole, false);
  const A poison = label == kBad ? std::numeric_limits<A>::quiet_NaN() : A(0);
  Term<Math> focal{0, 0, 0}, ldam{0, 0, 0};
  A w_ldam = valid ? A(1) : A(0);
  if (valid && p.ldam_weight) w_ldam = load_table<A>(p.ldam_weight, p.tables[1], label);
  if (p.work.focal) {
    focal = {poison, poison, poison};
    if (valid) {
      const A w_focal = p.focal_weight ? load_table<A>(p.focal_weight, p.tables[2], label) : A(1);
      focal = focal_term<Math>(gap, whole.t1, w_focal, options);
    }
  }
  if (p.work.ldam) {
    ldam = {poison, poison, poison};
    if (valid) {
      const A margin = p.margins ? load_table<A>(p.margins, p.tables[0], label) : A(0);
      ldam = ldam_term<Math>(gap, whole.t2, margin, w_ldam, options);
    }
  }
  A* saved = static_cast<A*>(p.saved) + row;
  const int64_t rows = p.work.rows.count;
  saved[0] = sums.m;
  saved[rows] = focal.c;
  saved[2 * rows] = ldam.c;
  saved[3 * rows] = focal.g;
  saved[4 * rows] = ldam.g;
  if (p.reduction == 0) {
    static_cast<A*>(p.loss)[row] = options.alpha * ldam.loss + options.beta * focal.loss;
  }
  totals[kLdam] += ldam.loss;
  totals[kFocal] += focal.loss;
  totals[kWeight] += w_ldam;
  totals[kKept] += counts ? A(1) : A(0);
}

template <typename A, int n>
__device__ __forceinline__ auto finish_into(const ForwardParams& p, A (&totals)[kTotals]) {
  return [&](int64_t row, int label, const Sums<A, n>& sums, A z_y) { finish_row(p, row, label, sums, z_y, totals); };
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
  if (p.reduction == 0) return;
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

// ---- few classes ---------------------------------------------------------------------------------------------------

template <typename T, int n>
__global__ void __launch_bounds__(kFlatThreads, sizeof(T) == 8 ? 4 : 7) forward_flat(const ForwardParams p) {
  using A = Acc<T>;
  A totals[kTotals] = {};
  flat_rows<T, n>(p, finish_into<A, n>(p, totals));
  reduce_totals<kFlatThreads>(p, totals);
}

// ---- neighbouring classes are neighbours in memory
// -------------------------------------------------------------------

template <typename T, int n>
__global__ void __launch_bounds__(kRowsThreads, sizeof(T) == 8 ? 1 : 2) forward_rows(const ForwardParams p) {
  using A = Acc<T>;
  __shared__ Tile<A, n, kTileRows> tile;
  const Rates<A, n> rates(p.work);
  A totals[kTotals] = {};
  const auto finish = finish_into<A, n>(p, totals);
  if (p.work.chunks == 1) {
    whole_rows<T>(p, tile, rates, finish);
    reduce_totals<kRowsThreads>(p, totals);
  } else if (split_rows<T>(p, tile, rates, finish) && p.reduction != 0) {
    __shared__ A scratch[kRowsThreads / kWarp * kTotals];
    block_sum<kRowsThreads>(totals, scratch);
    if (threadIdx.x == 0) store_loss(p, totals);
  }
}

// ---- neighbouring rows are neighbours in memory
// ----------------------------------------------------------------------

template <typename T, int V, int n>
__global__ void __launch_bounds__(kPixelsThreads, 4) forward_pixels(const ForwardParams p) {
  using A = Acc<T>;
  A totals[kTotals] = {};
  pixel_rows<T, V, n>(p, finish_into<A, n>(p, totals));
  reduce_totals<kPixelsThreads>(p, totals);
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
  A totals[kTotals] = {};
  const auto finish = finish_into<A, n>(p, totals);
  for_tiles<kPlanesThreads>(p, tile, rates, tiling, 1, [](int64_t, int) {}, sum, finish);
  reduce_totals<kPlanesThreads>(p, totals);
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
