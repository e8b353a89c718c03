// Argument checks, layout and allocation of the native ops: once, for both devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "lmf_cpu.h"

namespace lmf {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// The ops' arguments, as in the schemas of lmf.cpp.
struct Tables {
  const std::optional<at::Tensor>&margins, &ldam_weight, &focal_weight;
  const std::optional<at::Tensor>&ldam_normalizer, &focal_normalizer;
};

// Logits (N, C, d...) as (outer, C, inner), with the strides of one or two tensors of that shape. Collapses all rows
// into `inner` where one stride connects them.
struct Layout {
  int64_t rows, classes, inner_size;
  Strides strides, grad_strides;
};

// std::nullopt where the dimensions d... of a tensor do not collapse into one stride: the caller copies it first.
std::optional<Layout> layout_of(const at::Tensor& logits, const at::Tensor& grad);

struct ForwardResult {
  at::Tensor loss, saved, denominators;
};

void check_pair(const at::Tensor& logits, const at::Tensor& target);
void check_forward(const at::Tensor& logits, const at::Tensor& target, const Tables& tables, int64_t reduction);
void check_backward(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                    const at::Tensor& saved, const at::Tensor& denominators, int64_t reduction);
ForwardResult allocate_forward(const at::Tensor& logits, const at::Tensor& target, int64_t reduction);
at::ScalarType accumulation_type(const at::Tensor& logits);
Element element_of(const at::Tensor& logits);

// The CPU instruction set that the kernels use: "baseline", "avx2" or "avx512".
const char* cpu_capability();

}  // namespace lmf
