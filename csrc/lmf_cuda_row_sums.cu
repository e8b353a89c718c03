// The statistics kernels: eq. 1 alone, over a slice of the classes. There are none for planes: slices of images are too
// rare to compile them for.
#include "lmf_cuda_sums.cuh"

namespace lmf {
namespace cuda {

__device__ __forceinline__ int read_label(const SumsParams& p, int64_t row) {
  const int64_t y = p.target[offset(place(row, p.work.rows), p.target_strides)];
  const uint64_t local = static_cast<uint64_t>(y) - static_cast<uint64_t>(p.first_class);
  return y != p.ignore_index && local < static_cast<uint64_t>(p.work.classes) ? static_cast<int>(local) : kElsewhere;
}

__device__ __forceinline__ bool reads(const SumsParams&, int) { return true; }

// Stores m, t1, t2, z_y of a row. One sum alone stands for both.
template <typename A, int n>
__device__ __forceinline__ auto store_in(const SumsParams& p) {
  return [&p](int64_t row, int, const Sums<A, n>& sums, A z_y) {
    A* result = static_cast<A*>(p.sums) + row;
    const int64_t rows = p.work.rows.count;
    result[0] = sums.m;
    result[rows] = p.work.focal ? sums.t[0] : sums.t[n - 1];
    result[2 * rows] = p.work.ldam ? sums.t[n - 1] : sums.t[0];
    result[3 * rows] = z_y;
  };
}

template <typename T, int n>
__global__ void __launch_bounds__(kFlatThreads, sizeof(T) == 8 ? 4 : 7) sums_flat(const SumsParams p) {
  flat_rows<T, n>(p, store_in<Acc<T>, n>(p));
}

template <typename T, int n>
__global__ void __launch_bounds__(kRowsThreads, sizeof(T) == 8 ? 1 : 2) sums_rows(const SumsParams p) {
  using A = Acc<T>;
  __shared__ Tile<A, n, kTileRows> tile;
  const Rates<A, n> rates(p.work);
  const auto store = store_in<A, n>(p);
  if (p.work.chunks == 1) {
    whole_rows<T>(p, tile, rates, store);
  } else {
    split_rows<T>(p, tile, rates, store);
  }
}

template <typename T, int V, int n>
__global__ void __launch_bounds__(kPixelsThreads, 4) sums_pixels(const SumsParams p) {
  pixel_rows<T, V, n>(p, store_in<Acc<T>, n>(p));
}

cudaError_t launch_sums(const Launch& launch, const SumsParams& p, cudaStream_t stream) {
  return with_kernel(launch, [&](auto zero, auto exponentials) {
    using T = decltype(zero);
    constexpr int n = decltype(exponentials)::value;
    if (launch.regime == Regime::kFlat) {
      sums_flat<T, n><<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(p);
    } else if (launch.regime == Regime::kRows) {
      sums_rows<T, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    } else if (launch.width == 1) {
      sums_pixels<T, 1, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    } else if constexpr (sizeof(T) < 8) {
      sums_pixels<T, Vector<T>::size, n><<<launch.blocks, launch.threads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace cuda
}  // namespace lmf
