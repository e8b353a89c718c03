// The native ops on CPU tensors: memory, threads and reductions around the vectorised kernels.

#include "lmf_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "lmf.h"

namespace lmf {

// The best kernels of this CPU; LMF_CPU_CAPABILITY lowers the choice, as ATEN_CPU_CAPABILITY does for PyTorch.
static const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const char* wish = std::getenv("LMF_CPU_CAPABILITY");
    const std::string_view cap = wish ? wish : "avx512";
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && cap == "avx512") return kKernelsAvx512;
    if (avx2 && (cap == "avx512" || cap == "avx2")) return kKernelsAvx2;
#endif
    return kKernelsBaseline;
  }();
  return chosen;
}

const char* cpu_capability() { return kernels().name; }

// Rows are cut into blocks by their cost alone, never by the number of threads, so that sums do not depend on it.
struct Blocks {
  static constexpr int64_t kRowOverhead = 16;  // the cost of a row beside its classes, in logits
  static constexpr int64_t kBlockCost = 8192;  // in logits
  static constexpr int64_t kGrain = 4;         // blocks that are worth waking a thread for
  static constexpr int64_t kTileRows = 64;     // as in lmf_cpu_tile.h, to cut between tiles
  static constexpr int64_t kMost = 1024;       // bounds the memory for partial sums
  int64_t rows_per_block, count;

  Blocks(int64_t rows, int64_t classes) {
    rows_per_block = std::max<int64_t>({1, kBlockCost / (classes + kRowOverhead), (rows + kMost - 1) / kMost});
    if (rows_per_block > kTileRows / 2) rows_per_block = (rows_per_block + kTileRows - 1) / kTileRows * kTileRows;
    count = (rows + rows_per_block - 1) / rows_per_block;
  }
  // function(first block, first row, end of rows), on some blocks in a row.
  template <typename Function>
  void parallel(int64_t rows, int64_t classes, const Function& function) const {
    const int64_t cost = rows_per_block * (classes + kRowOverhead);
    const int64_t grain = std::max<int64_t>(1, kGrain * kBlockCost / cost);
    at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
      function(first, first * rows_per_block, std::min(rows, last * rows_per_block));
    });
  }
};

static void fill_problem(Problem& p, const at::Tensor& logits, const at::Tensor& target, const Layout& layout,
                         double alpha, double beta, double gamma, double s) {
  p.logits = logits.const_data_ptr();
  int64_t last = 0;  // the largest offset
  for (int64_t d = 0; d < logits.dim(); d++) last += logits.numel() ? (logits.size(d) - 1) * logits.stride(d) : 0;
  p.logits_end = static_cast<const char*>(p.logits) + (last + 1) * logits.element_size();
  p.strides = layout.strides;
  p.classes = layout.classes;
  p.inner_size = layout.inner_size;
  p.rows = layout.rows;
  p.target = target.const_data_ptr<int64_t>();
  p.alpha = alpha;
  p.beta = beta;
  p.gamma = gamma;
  p.s = s;
}

template <typename Function>
static void with_accumulator(const at::Tensor& t, const Function& function) {
  if (t.scalar_type() == at::kDouble) {
    function(double{});
  } else {
    function(float{});
  }
}

static double read_scalar(const at::Tensor& t, int64_t index = 0) {
  double value = 0;
  with_accumulator(t, [&](auto zero) { value = t.const_data_ptr<decltype(zero)>()[index]; });
  return value;
}

static void write_scalar(const at::Tensor& t, int64_t index, double value) {
  with_accumulator(
      t, [&](auto zero) { t.mutable_data_ptr<decltype(zero)>()[index] = static_cast<decltype(zero)>(value); });
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cpu(
    const at::Tensor& logits_in, const at::Tensor& target_in, const std::optional<at::Tensor>& margins,
    const std::optional<at::Tensor>& ldam_weight, const std::optional<at::Tensor>& focal_weight,
    const std::optional<at::Tensor>& ldam_normalizer, const std::optional<at::Tensor>& focal_normalizer, double alpha,
    double beta, double gamma, double s, int64_t ignore_index, int64_t reduction) {
  check_forward(logits_in, target_in, {margins, ldam_weight, focal_weight, ldam_normalizer, focal_normalizer},
                reduction);
  const auto acc = accumulation_type(logits_in);
  auto layout = layout_of(logits_in, logits_in);
  const at::Tensor logits = layout ? logits_in : logits_in.contiguous();
  if (!layout) layout = layout_of(logits, logits);
  const at::Tensor target = target_in.contiguous();
  ForwardResult result = allocate_forward(logits, target, reduction);

  ForwardArguments p{};
  fill_problem(p, logits, target, *layout, alpha, beta, gamma, s);
  at::Tensor converted[3];
  const void** tables[3] = {&p.margins, &p.ldam_weight, &p.focal_weight};
  const std::optional<at::Tensor>* given[3] = {&margins, &ldam_weight, &focal_weight};
  for (int i = 0; i < 3; i++) {
    if (!*given[i]) continue;
    converted[i] = (*given[i])->to(acc).contiguous();
    *tables[i] = converted[i].const_data_ptr();
  }
  p.ignore_index = ignore_index;
  p.saved = result.saved.mutable_data_ptr();
  p.row_loss = reduction == kNone ? result.loss.mutable_data_ptr() : nullptr;

  const Blocks blocks(p.rows, p.classes);
  c10::SmallVector<Partial, 16> partials(blocks.count);
  const auto kernel = kernels().forward[static_cast<int>(element_of(logits))];
  blocks.parallel(p.rows, p.classes, [&](int64_t block, int64_t begin, int64_t end) {
    kernel(p, begin, end, blocks.rows_per_block, &partials[block]);
  });
  Partial sum;
  for (const Partial& partial : partials) {
    TORCH_CHECK_INDEX(partial.bad_row < 0, "target ", p.target[partial.bad_row],
                      " is out of bounds: labels must lie in [0, ", p.classes,
                      ") or equal ignore_index=", ignore_index);
    sum.ldam += partial.ldam;
    sum.focal += partial.focal;
    sum.weight += partial.weight;
    sum.kept += partial.kept;
  }
  double ldam_denominator = 1, focal_denominator = 1;
  if (reduction == kMean) {
    ldam_denominator = ldam_normalizer ? read_scalar(ldam_normalizer->to(at::kDouble)) : sum.weight;
    focal_denominator = focal_normalizer ? read_scalar(focal_normalizer->to(at::kDouble)) : double(sum.kept);
    write_scalar(result.denominators, 0, ldam_denominator);
    write_scalar(result.denominators, 1, focal_denominator);
  }
  if (reduction != kNone) {
    write_scalar(result.loss, 0,
                 (alpha != 0 ? alpha * sum.ldam / ldam_denominator : 0) +
                     (beta != 0 ? beta * sum.focal / focal_denominator : 0));
  }
  return {result.loss, result.saved, result.denominators};
}

// `result` may be the logits themselves: a vector of them is read before its gradient is written, and never again.
static void write_gradient(const at::Tensor& grad_output_in, const at::Tensor& logits_in, const at::Tensor& target_in,
                           const at::Tensor& saved, const at::Tensor& denominators, double alpha, double beta,
                           double gamma, double s, int64_t ignore_index, int64_t reduction, const at::Tensor& result) {
  check_backward(grad_output_in, logits_in, target_in, saved, denominators, reduction);
  auto layout = layout_of(logits_in, result);
  const bool copied = !layout;
  const at::Tensor logits = copied ? logits_in.contiguous() : logits_in;
  const at::Tensor grad = copied ? at::empty_like(logits) : result;
  if (copied) layout = layout_of(logits, grad);
  const at::Tensor target = target_in.contiguous();
  const bool expanded = std::all_of(grad_output_in.strides().begin(), grad_output_in.strides().end(),
                                    [](int64_t stride) { return stride == 0; });
  const at::Tensor grad_output = expanded ? grad_output_in : grad_output_in.contiguous();

  BackwardArguments p{};
  fill_problem(p, logits, target, *layout, alpha, beta, gamma, s);
  p.saved = saved.const_data_ptr();
  p.grad_output = grad_output.const_data_ptr();
  p.grad_output_stride = expanded ? 0 : 1;
  p.ldam_denominator = denominators.numel() ? read_scalar(denominators, 0) : 1;
  p.focal_denominator = denominators.numel() ? read_scalar(denominators, 1) : 1;
  p.grad_logits = grad.mutable_data_ptr();
  p.grad_strides = layout->grad_strides;
  constexpr size_t kCaches = 4 << 20;  // a larger gradient leaves the cores' own caches before anyone reads it
  p.stream_grad = grad.nbytes() >= kCaches && grad.const_data_ptr() != logits.const_data_ptr();

  const auto kernel = kernels().backward[static_cast<int>(element_of(logits))];
  Blocks(p.rows, p.classes).parallel(p.rows, p.classes, [&](int64_t, int64_t begin, int64_t end) {
    kernel(p, begin, end);
  });
  if (copied) result.copy_(grad);
}

static at::Tensor backward_cpu(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                               const at::Tensor& saved, const at::Tensor& denominators, double alpha, double beta,
                               double gamma, double s, int64_t ignore_index, int64_t reduction) {
  const at::Tensor result = at::empty_like(logits);
  write_gradient(grad_output, logits, target, saved, denominators, alpha, beta, gamma, s, ignore_index, reduction,
                 result);
  return result;
}

static void backward_in_place_cpu(const at::Tensor& grad_output, at::Tensor& logits, const at::Tensor& target,
                                  const at::Tensor& saved, const at::Tensor& denominators, double alpha, double beta,
                                  double gamma, double s, int64_t ignore_index, int64_t reduction) {
  write_gradient(grad_output, logits, target, saved, denominators, alpha, beta, gamma, s, ignore_index, reduction,
                 logits);
}

static at::Tensor sums_cpu(const at::Tensor& logits_in, const at::Tensor& target_in, int64_t first_class, double alpha,
                           double beta, double gamma, double s, int64_t ignore_index, int64_t reduction) {
  check_pair(logits_in, target_in);
  auto layout = layout_of(logits_in, logits_in);
  const at::Tensor logits = layout ? logits_in : logits_in.contiguous();
  if (!layout) layout = layout_of(logits, logits);
  const at::Tensor target = target_in.contiguous();
  const at::Tensor result = at::empty({4, target.numel()}, logits.options().dtype(accumulation_type(logits)));
  SumsArguments p{};
  fill_problem(p, logits, target, *layout, alpha, beta, gamma, s);
  p.first_class = first_class;
  p.ignore_index = ignore_index;
  p.sums = result.mutable_data_ptr();
  const auto kernel = kernels().sums[static_cast<int>(element_of(logits))];
  Blocks(p.rows, p.classes).parallel(p.rows, p.classes, [&](int64_t, int64_t begin, int64_t end) {
    kernel(p, begin, end);
  });
  return result;
}

}  // namespace lmf

TORCH_LIBRARY_IMPL(lmf_kernels, CPU, m) {
  m.impl("native_forward", &lmf::forward_cpu);
  m.impl("native_backward", &lmf::backward_cpu);
  m.impl("native_backward_", &lmf::backward_in_place_cpu);
  m.impl("native_sums", &lmf::sums_cpu);
}
