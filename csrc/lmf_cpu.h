// What the tensor code in lmf_cpu.cpp and the vectorised kernels share. The kernels are compiled once for each
// instruction set and handed out as a table of functions; nothing here depends on ATen.
#pragma once

#include <cstdint>

namespace lmf {

enum class Element { kHalf, kBFloat16, kFloat, kDouble };
constexpr int kElements = 4;

// Logits (N, C, d...) seen as (outer, C, inner): row = outer * inner_size + inner. Strides in elements.
struct Strides {
  int64_t outer, classes, inner;
};

struct Problem {
  const void* logits;
  const void* logits_end;  // one past the last element that any row holds
  Strides strides;
  int64_t classes, inner_size, rows;
  const int64_t* target;  // (rows)
  double alpha, beta, gamma, s;
};

struct ForwardArguments : Problem {
  const void* margins;       // (C) in the accumulation type, or null
  const void* ldam_weight;   // likewise
  const void* focal_weight;  // likewise
  int64_t ignore_index;
  void* saved;     // (5, rows), accumulation type
  void* row_loss;  // (rows), accumulation type; null unless reduction is none
};

// Statistics of rows over a slice of their classes; labels count from class 0 of the whole.
struct SumsArguments : Problem {
  int64_t first_class, ignore_index;
  void* sums;  // (4, rows), accumulation type: m, t1, t2, z_y; z_y = 0 where the target is not in the slice
};

struct BackwardArguments : Problem {
  const void* saved;        // (5, rows)
  const void* grad_output;  // accumulation type
  int64_t grad_output_stride;
  double ldam_denominator, focal_denominator;
  void* grad_logits;  // may be the logits themselves
  bool stream_grad;   // where that pays: it is fresh and larger than the caches
  Strides grad_strides;
};

// What a block of rows adds to the reductions.
struct Partial {
  double ldam = 0, focal = 0;  // sums of weighted terms
  double weight = 0;           // sum of ldam_weight[y]
  int64_t kept = 0;
  int64_t bad_row = -1;  // the first row whose label is out of bounds
};

struct Kernels {
  const char* name;
  // Of rows [begin, end), with one partial sum for each rows_per_block of them.
  void (*forward[kElements])(const ForwardArguments&, int64_t begin, int64_t end, int64_t rows_per_block, Partial*);
  void (*backward[kElements])(const BackwardArguments&, int64_t begin, int64_t end);
  void (*sums[kElements])(const SumsArguments&, int64_t begin, int64_t end);
};

extern const Kernels kKernelsBaseline;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

}  // namespace lmf
