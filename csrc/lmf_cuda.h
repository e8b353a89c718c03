// What the tensor code (lmf_cuda.cpp), the planning (lmf_cuda_plan.cpp) and the kernels (lmf_cuda_*.cu) share.
// No ATen here: its headers would cost each .cu file a minute.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lmf_cpu.h"  // Element

namespace lmf {
namespace cuda {

// How rows and classes are dealt out to threads.
enum class Regime : int {
  kFlat,    // few classes, rows one behind the other: a tile of rows is loaded flat, a thread owns a row
  kRows,    // neighbouring classes are neighbours in memory: 1 to 256 lanes share a row
  kPixels,  // neighbouring rows are neighbours in memory: a thread owns one row, or 16 bytes of them where all is
            // aligned
  kPlanes   // the same for any alignment: a tile of rows is loaded flat, some classes at a time
};

constexpr int kFlatThreads = 128, kRowsThreads = 256, kPixelsThreads = 128, kPlanesThreads = 256;
constexpr int kFlatBytes = 256;      // the longest row of the flat regime
constexpr int kTileRows = 256;       // rows in a tile of the rows regime, at most
constexpr int kPlaneElements = 512;  // of shared memory for one class of a planes tile: its rows and a vector's head
constexpr int kWarp = 32;

// What atomics count in; 0 between launches.
using Counter = unsigned long long;

// Strides of one tensor along the levels of the rows, in elements.
struct Steps {
  int64_t s0, s1, s2;
};

// Rows are numbered as in the target: row = (i0 * middle + i1) * inner + i2. Fewer levels: i0 = 0, or i0 = i1 = 0.
struct Rows {
  int64_t count, middle, inner;
  int levels;
};

struct Work {
  Rows rows;
  int classes;
  int lane_bits;        // kRows: 2^lane_bits lanes share a row,
  int rows_per_group;   //   which takes this many rows one after the other
  int chunk, chunks;    // kRows: classes that a block takes in, and blocks that share a row
  bool ldam, focal;     // alpha != 0, beta != 0
  double rate1, rate2;  // of exp(rate d), times log2(e) for float: rate1 alone where both terms have the same
  double s;
};

// A tensor of any floating dtype that is converted where it is read.
struct Table {
  int64_t stride;
  Element element;
};

struct ForwardParams {
  // What the pointers point to is known to `Launch::tensors` in this order.
  const void* logits;           // (N, C, d...)
  const int64_t* target;        // (N, d...)
  const void* margins;          // (C) or null
  const void* ldam_weight;      // (C) or null
  const void* focal_weight;     // (C) or null
  const void* ldam_normalizer;  // () or null
  const void* focal_normalizer;
  void* loss;          // () or (rows)
  void* saved;         // (5, rows) = m, c1, c2, g1, g2
  void* denominators;  // (2) or empty
  void* partials;      // (words, blocks): what each block adds to the sums, or m, t1, t2 of each chunk of a row
  Counter* counter;    // 0 between launches

  Work work;
  Steps strides, target_strides;
  int64_t stride_c;
  Table tables[5];  // of margins, ldam_weight, focal_weight and the normalizers
  double alpha, beta, gamma;
  int64_t ignore_index;
  int reduction;
};

struct SumsParams {
  const void* logits;     // (N, C, d...)
  const int64_t* target;  // (N, d...)
  void* sums;             // (4, rows) = m, t1, t2, z_y; z_y = 0 where the target is not in the slice
  void* partials;         // (words, blocks): m, t1, t2 of each chunk of a row
  Counter* counter;       // 0 between launches

  Work work;
  Steps strides, target_strides;
  int64_t stride_c;
  int64_t first_class, ignore_index;
};

struct BackwardParams {
  const void* grad_output;  // () or (N, d...)
  const void* logits;
  const int64_t* target;
  const void* saved;
  const void* denominators;
  void* grad_logits;  // may be the logits: nobody reads an element once its gradient is written

  Work work;
  Steps strides, grad_strides, target_strides, outer_strides;
  int64_t stride_c, grad_stride_c;
  int reduction;
};

// Words a block that a forward or statistics launch hands over in memory. One block has nobody to tell; 'sum' is one
// number; 'mean' has two sums and a denominator, the other of which the counter counts.
inline int partial_words(const Work& work, int reduction, int exponentials, unsigned blocks) {
  if (work.chunks > 1) return 1 + exponentials;
  return reduction == 0 || blocks == 1 ? 0 : reduction == 1 ? 3 : 1;
}

// Which kernel, and its grid.
struct Launch {
  Regime regime;
  Element element;
  int width;  // kPixels: neighbouring rows that a thread loads at once: 16 bytes of them or one
  int exponentials;
  unsigned blocks, threads, shared_bytes;
};

// lmf_cuda_plan.cpp. All fill in params.work, but for what they find there: rows, classes, ldam, focal and s.
Launch plan_forward(ForwardParams& params, Element element, int multiprocessors);
Launch plan_sums(SumsParams& params, Element element, int multiprocessors);
Launch plan_backward(BackwardParams& params, Element element, int multiprocessors);

cudaError_t launch_forward(const Launch& launch, const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_sums(const Launch& launch, const SumsParams& params, cudaStream_t stream);
cudaError_t launch_backward(const Launch& launch, const BackwardParams& params, cudaStream_t stream);

}  // namespace cuda
}  // namespace lmf
