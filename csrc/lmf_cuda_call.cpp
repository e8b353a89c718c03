#include "lmf_cuda_call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/SmallVector.h>

#include <array>

namespace lmf {
namespace cuda {

// ---- where rows are ------------------------------------------------------------------------------------------------

using Strides = c10::SmallVector<int64_t, 6>;

// The strides of (N, C, d...) along (N, d...).
static Strides row_strides(const at::Tensor& t) {
  Strides strides(t.strides().begin(), t.strides().end());
  strides.erase(strides.begin() + 1);
  return strides;
}

static Strides all_strides(const at::Tensor& t) { return Strides(t.strides().begin(), t.strides().end()); }

// Merges the dimensions `sizes` that lie behind one another in every tensor; nothing if more than three levels are
// left.
template <size_t n>
static std::optional<Rows> merge(at::IntArrayRef sizes, const std::array<Strides, n>& strides,
                                 const std::array<Steps*, n>& steps) {
  struct Level {
    int64_t size;
    std::array<int64_t, n> steps;
  };
  c10::SmallVector<Level, 6> levels;
  Rows rows{1, 1, 1, 1};
  for (size_t d = 0; d < sizes.size(); d++) {
    rows.count *= sizes[d];
    if (sizes[d] == 1) continue;
    Level level{sizes[d], {}};
    bool behind = !levels.empty();
    for (size_t i = 0; i < n; i++) {
      level.steps[i] = strides[i][d];
      behind = behind && levels.back().steps[i] == sizes[d] * level.steps[i];
    }
    if (behind) {
      level.size *= levels.back().size;
      levels.back() = level;
    } else {
      levels.push_back(level);
    }
  }
  if (levels.size() > 3) return std::nullopt;
  while (levels.size() < 3) levels.insert(levels.begin(), Level{1, {}});
  rows.levels = levels[0].size > 1 ? 3 : levels[1].size > 1 ? 2 : 1;
  rows.middle = levels[1].size;
  rows.inner = levels[2].size;
  for (size_t i = 0; i < n; i++) *steps[i] = {levels[0].steps[i], levels[1].steps[i], levels[2].steps[i]};
  return rows;
}

// ---- parameters ----------------------------------------------------------------------------------------------------

static void describe_work(Work& work, const at::Tensor& logits, double alpha, double beta, double s) {
  TORCH_CHECK_VALUE(logits.size(1) <= (1 << 30), "at most 2^30 classes, got ", logits.size(1));
  work.classes = static_cast<int>(logits.size(1));
  work.ldam = alpha != 0;
  work.focal = beta != 0;
  work.s = s;
}

static Element element_of_table(const at::Tensor& table) {
  switch (table.scalar_type()) {
    case at::kHalf:
      return Element::kHalf;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kFloat:
      return Element::kFloat;
    case at::kDouble:
      return Element::kDouble;
    default:
      TORCH_CHECK_TYPE(false, "weights, margins and normalizers must be float16, bfloat16, float32 or float64, got ",
                       table.scalar_type());
  }
}

// The rows of logits and target, which become copies where their strides do not merge.
static Rows find_rows(at::Tensor& logits, at::Tensor& target, Steps& strides, Steps& target_strides) {
  const auto find = [&] {
    return merge<2>(target.sizes(), {row_strides(logits), all_strides(target)}, {&strides, &target_strides});
  };
  std::optional<Rows> rows = find();
  if (!rows) {
    logits = logits.contiguous();
    target = target.contiguous();
    rows = find();
  }
  return *rows;
}

ForwardCall::ForwardCall(const at::Tensor& logits, const at::Tensor& target, const Tables& tables,
                         const Coefficients& coefficients, int64_t ignore_index, int64_t reduction, int multiprocessors)
    : logits_(logits), target_(target) {
  auto& p = params;
  p.work.rows = find_rows(logits_, target_, p.strides, p.target_strides);
  result = allocate_forward(logits_, target_, reduction);

  p.logits = logits_.const_data_ptr();
  p.target = target_.const_data_ptr<int64_t>();
  const std::optional<at::Tensor>* given[] = {&tables.margins, &tables.ldam_weight, &tables.focal_weight,
                                              &tables.ldam_normalizer, &tables.focal_normalizer};
  const void** pointers[] = {&p.margins, &p.ldam_weight, &p.focal_weight, &p.ldam_normalizer, &p.focal_normalizer};
  for (int i = 0; i < 5; i++) {
    tables_.push_back(given[i]->value_or(at::Tensor()));
    if (!*given[i]) continue;
    const at::Tensor& table = **given[i];
    *pointers[i] = table.const_data_ptr();
    p.tables[i] = {table.dim() ? table.stride(0) : 0, element_of_table(table)};
  }
  p.loss = result.loss.mutable_data_ptr();
  p.saved = result.saved.mutable_data_ptr();
  p.denominators = result.denominators.mutable_data_ptr();
  p.stride_c = logits_.stride(1);
  p.alpha = coefficients.alpha;
  p.beta = coefficients.beta;
  p.gamma = coefficients.gamma;
  p.ignore_index = ignore_index;
  p.reduction = static_cast<int>(reduction);
  describe_work(p.work, logits_, coefficients.alpha, coefficients.beta, coefficients.s);

  launch = plan_forward(p, element_of(logits_), multiprocessors);
  const int words = partial_words(p.work, p.reduction, launch.exponentials, launch.blocks);
  if (words > 0) {
    partials_ = at::empty({words, int64_t{launch.blocks}}, result.saved.options());
    p.partials = partials_.mutable_data_ptr();
  }
}

std::vector<at::Tensor> ForwardCall::tensors() const {
  std::vector<at::Tensor> all{logits_, target_};
  all.insert(all.end(), tables_.begin(), tables_.end());
  all.insert(all.end(), {result.loss, result.saved, result.denominators, partials_});
  return all;
}

SumsCall::SumsCall(const at::Tensor& logits, const at::Tensor& target, int64_t first_class, int64_t ignore_index,
                   double alpha, double beta, double s, int multiprocessors)
    : logits_(logits), target_(target) {
  auto& p = params;
  p.work.rows = find_rows(logits_, target_, p.strides, p.target_strides);
  result = at::empty({4, target_.numel()}, logits_.options().dtype(accumulation_type(logits_)));
  p.logits = logits_.const_data_ptr();
  p.target = target_.const_data_ptr<int64_t>();
  p.sums = result.mutable_data_ptr();
  p.stride_c = logits_.stride(1);
  p.first_class = first_class;
  p.ignore_index = ignore_index;
  describe_work(p.work, logits_, alpha, beta, s);

  launch = plan_sums(p, element_of(logits_), multiprocessors);
  const int words = partial_words(p.work, kNone, launch.exponentials, launch.blocks);
  if (words > 0) {
    partials_ = at::empty({words, int64_t{launch.blocks}}, result.options());
    p.partials = partials_.mutable_data_ptr();
  }
}

BackwardCall::BackwardCall(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                           const at::Tensor& saved, const at::Tensor& denominators, double alpha, double beta, double s,
                           const at::Tensor& result, int multiprocessors)
    : grad_output_(grad_output),
      logits_(logits),
      target_(target),
      stats_(saved),
      denominators_(denominators),
      grad_(result),
      result_(result) {
  auto& p = params;
  std::optional<Rows> rows;
  const auto find_rows = [&] {
    const Strides outer = grad_output_.dim() ? all_strides(grad_output_) : all_strides(target_);
    rows = merge<4>(target_.sizes(), {row_strides(logits_), row_strides(grad_), all_strides(target_), outer},
                    {&p.strides, &p.grad_strides, &p.target_strides, &p.outer_strides});
  };
  find_rows();
  if (!rows) {
    logits_ = logits.contiguous();
    target_ = target.contiguous();
    grad_output_ = grad_output.contiguous();
    grad_ = result.is_same(logits) ? logits_ : at::empty_like(logits_);
    find_rows();
  }
  p.grad_output = grad_output_.const_data_ptr();
  p.logits = logits_.const_data_ptr();
  p.target = target_.const_data_ptr<int64_t>();
  p.saved = stats_.const_data_ptr();
  p.denominators = denominators_.const_data_ptr();
  p.grad_logits = grad_.mutable_data_ptr();
  p.stride_c = logits_.stride(1);
  p.grad_stride_c = grad_.stride(1);
  p.reduction = denominators_.numel() ? kMean : grad_output_.dim() ? kNone : kSum;
  p.work.rows = *rows;
  describe_work(p.work, logits_, alpha, beta, s);
  launch = plan_backward(p, element_of(logits_), multiprocessors);
}

void BackwardCall::finish() const {
  if (!grad_.is_same(result_)) result_.copy_(grad_);
}

}  // namespace cuda
}  // namespace lmf
