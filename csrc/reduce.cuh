// Reductions over the lanes of a row, a block and a grid. Always in the same order, so results are the same bit for bit
// from run to run.
#pragma once

#include "lmf_cuda.h"

namespace lmf {
namespace cuda {

// The value of the lane whose number differs by the bit `offset`; all lanes of the warp take part.
template <typename A>
__device__ __forceinline__ A from_lane(A value, int offset) {
  return __shfl_xor_sync(0xffffffffu, value, offset);
}

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += from_lane(value, offset);
  return value;
}

// Sums over the block, in thread 0. `scratch` has n values for each warp.
template <int threads, int n, typename A>
__device__ __forceinline__ void block_sum(A (&values)[n], A* scratch) {
  constexpr int kWarps = threads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < n; i++) {
    values[i] = warp_sum(values[i]);
    if (lane == 0) scratch[warp * n + i] = values[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < n; i++) {
      A sum = 0;
      for (int w = 0; w < kWarps; w++) sum += scratch[w * n + i];
      values[i] = sum;
    }
  }
}

// Whether this is the last block to arrive; the caller then sees through `load_fresh` what all blocks stored before.
// Every thread orders its stores before the barrier, and the barrier comes before the one atomic of the block. The
// counter adds up something on the way: `count` of thread 0, below 2^40 in all, becomes the sum.
__device__ __forceinline__ bool arrive_last(Counter* counter, Counter& count) {
  constexpr Counter kArrival = Counter{1} << 40;
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const Counter seen = atomicAdd(counter, kArrival + count) + kArrival + count;
    last = seen / kArrival == gridDim.x;
    if (last) atomicExch(counter, Counter{0});  // for the next launch: nobody else looks at it any more
    count = seen % kArrival;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// What another block stored: never from this multiprocessor's L1.
template <typename A>
__device__ __forceinline__ A load_fresh(const A* address) {
  return *static_cast<const volatile A*>(address);
}

}  // namespace cuda
}  // namespace lmf
