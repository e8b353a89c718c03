// The native ops' schemas, what both devices share, and the pybind11 module.

#include "lmf.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <limits>
#include <string>
#include <vector>

namespace lmf {

at::ScalarType accumulation_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Element element_of(const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kHalf:
      return Element::kHalf;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kFloat:
      return Element::kFloat;
    case at::kDouble:
      return Element::kDouble;
    default:
      TORCH_CHECK_TYPE(false, "logits must be float16, bfloat16, float32 or float64, got ", logits.scalar_type());
  }
}

// Storages may be emptied or shrunk under their tensors, as offloading and sharding do: then pointers promise nothing.
static void check_memory(const char* name, const at::Tensor& t) {
  if (t.numel() == 0) return;
  int64_t last = t.storage_offset();
  for (int64_t d = 0; d < t.dim(); d++) last += (t.size(d) - 1) * t.stride(d);
  const auto needed = static_cast<uint64_t>(last + 1) * t.element_size();
  TORCH_CHECK(needed <= t.storage().nbytes(), name, " of shape ", t.sizes(), " needs ", needed,
              " bytes, but its storage holds ", t.storage().nbytes(), ": its memory was released or resized");
}

void check_pair(const at::Tensor& logits, const at::Tensor& target) {
  element_of(logits);
  TORCH_CHECK_VALUE(logits.dim() >= 2 && logits.size(1) >= 1,
                    "logits must have shape (N, C, d1, ..., dk) with C >= 1, got ", logits.sizes());
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64, got ", target.scalar_type());
  TORCH_CHECK(target.device() == logits.device(), "target must be on ", logits.device(), ", got ", target.device());
  bool fits = target.dim() == logits.dim() - 1 && target.size(0) == logits.size(0);
  for (int64_t d = 1; fits && d < target.dim(); d++) fits = target.size(d) == logits.size(d + 1);
  TORCH_CHECK_VALUE(fits, "target must have the shape of logits without its class dimension, got ", target.sizes(),
                    " for logits ", logits.sizes());
  TORCH_CHECK_VALUE(logits.size(1) <= std::numeric_limits<int32_t>::max(),
                    "logits must have fewer than 2^31 classes, got ", logits.size(1));
  check_memory("logits (input)", logits);
  check_memory("target", target);
}

static void check_table(const char* name, const std::optional<at::Tensor>& table, const at::Tensor& logits) {
  if (!table) return;
  TORCH_CHECK_VALUE(table->dim() == 1 && table->size(0) == logits.size(1), name, " must have shape (", logits.size(1),
                    "), got ", table->sizes());
  TORCH_CHECK_TYPE(table->is_floating_point(), name, " must be floating point, got ", table->scalar_type());
  TORCH_CHECK(table->device() == logits.device(), name, " must be on ", logits.device(), ", got ", table->device());
  check_memory(name, *table);
}

static void check_normalizer(const char* name, const std::optional<at::Tensor>& normalizer, const at::Tensor& logits,
                             int64_t reduction) {
  if (!normalizer) return;
  TORCH_CHECK_VALUE(reduction == kMean, name, " needs reduction mean");
  TORCH_CHECK_VALUE(normalizer->dim() == 0, name, " must be 0-dim, got ", normalizer->sizes());
  TORCH_CHECK_TYPE(normalizer->is_floating_point(), name, " must be floating point, got ", normalizer->scalar_type());
  TORCH_CHECK(normalizer->device() == logits.device(), name, " must be on ", logits.device(), ", got ",
              normalizer->device());
  check_memory(name, *normalizer);
}

void check_forward(const at::Tensor& logits, const at::Tensor& target, const Tables& tables, int64_t reduction) {
  check_pair(logits, target);
  TORCH_CHECK_VALUE(reduction >= kNone && reduction <= kSum, "reduction must be 0, 1 or 2, got ", reduction);
  check_table("margins", tables.margins, logits);
  check_table("ldam_weight", tables.ldam_weight, logits);
  check_table("focal_weight", tables.focal_weight, logits);
  check_normalizer("ldam_normalizer", tables.ldam_normalizer, logits, reduction);
  check_normalizer("focal_normalizer", tables.focal_normalizer, logits, reduction);
}

void check_backward(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                    const at::Tensor& saved, const at::Tensor& denominators, int64_t reduction) {
  check_pair(logits, target);
  const auto acc = accumulation_type(logits);
  const auto check = [&](const char* name, const at::Tensor& t, bool fits) {
    TORCH_CHECK_VALUE(fits, name, " does not belong to these logits, got shape ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == acc, name, " must be ", acc, ", got ", t.scalar_type());
    TORCH_CHECK(t.device() == logits.device(), name, " must be on ", logits.device(), ", got ", t.device());
    check_memory(name, t);
  };
  check("grad_output", grad_output,
        reduction == kNone ? grad_output.sizes() == target.sizes() : grad_output.dim() == 0);
  check("saved", saved,
        saved.dim() == 2 && saved.size(0) == 5 && saved.size(1) == target.numel() && saved.is_contiguous());
  check(
      "denominators", denominators,
      denominators.dim() == 1 && denominators.size(0) == (reduction == kMean ? 2 : 0) && denominators.is_contiguous());
}

ForwardResult allocate_forward(const at::Tensor& logits, const at::Tensor& target, int64_t reduction) {
  const auto options = logits.options().dtype(accumulation_type(logits));
  return {reduction == kNone ? at::empty(target.sizes(), options) : at::empty({}, options),
          at::empty({5, target.numel()}, options), at::empty({reduction == kMean ? 2 : 0}, options)};
}

// The stride that connects the dimensions d... of (N, C, d...), or nothing.
static std::optional<int64_t> inner_stride(const at::Tensor& t) {
  int64_t stride = 1, size = 1;
  if (t.numel() == 0) return stride;
  for (int64_t d = t.dim() - 1; d >= 2; d--) {
    if (t.size(d) == 1) continue;
    if (size == 1) {
      stride = t.stride(d);
    } else if (t.stride(d) != stride * size) {
      return std::nullopt;
    }
    size *= t.size(d);
  }
  return stride;
}

std::optional<Layout> layout_of(const at::Tensor& logits, const at::Tensor& grad) {
  const auto stride = inner_stride(logits), grad_stride = inner_stride(grad);
  if (!stride || !grad_stride) return std::nullopt;
  Layout layout{};
  layout.classes = logits.size(1);
  layout.inner_size = 1;
  for (int64_t d = 2; d < logits.dim(); d++) layout.inner_size *= logits.size(d);
  layout.rows = logits.size(0) * layout.inner_size;
  layout.strides = {logits.stride(0), logits.stride(1), *stride};
  layout.grad_strides = {grad.stride(0), grad.stride(1), *grad_stride};
  if (layout.inner_size == 1) {
    layout.strides.inner = layout.strides.outer;
    layout.grad_strides.inner = layout.grad_strides.outer;
    layout.inner_size = layout.rows;
  } else if (layout.strides.outer == layout.strides.inner * layout.inner_size &&
             layout.grad_strides.outer == layout.grad_strides.inner * layout.inner_size) {
    layout.inner_size = layout.rows;
  }
  return layout;
}

#if defined(LMF_CUDA)
static std::vector<std::string> devices() { return {"cpu", "cuda"}; }
static std::string cuda_architectures() { return LMF_CUDA; }
namespace cuda {
void bind(pybind11::module_&);
}
#else
static std::vector<std::string> devices() { return {"cpu"}; }
static std::string cuda_architectures() { return ""; }
#endif

// The ops through the dispatcher, but without the boxing and parsing of torch.ops, which takes longer than the kernels
// of a small batch, and below their own autograd step: lmf_kernels._ops has Functions for that.
using OptionalTensor = std::optional<at::Tensor>;
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                               const OptionalTensor&, const OptionalTensor&,
                                                               const OptionalTensor&, const OptionalTensor&,
                                                               const OptionalTensor&, double, double, double, double,
                                                               int64_t, int64_t);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const at::Tensor&, double, double, double, double, int64_t, int64_t);

template <typename Signature>
struct Dispatched;
template <typename Result, typename... Arguments>
struct Dispatched<Result(Arguments...)> {
  c10::TypedOperatorHandle<Result(Arguments...)> op;
  explicit Dispatched(const char* name)
      : op(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Arguments...)>()) {}
  Result operator()(Arguments... arguments) const {
    at::AutoDispatchBelowAutograd guard;
    return op.call(arguments...);
  }
};

}  // namespace lmf

TORCH_LIBRARY(lmf_kernels, m) {
  m.def(
      "native_forward(Tensor logits, Tensor target, Tensor? margins, Tensor? ldam_weight, Tensor? focal_weight, "
      "Tensor? ldam_normalizer, Tensor? focal_normalizer, float alpha, float beta, float gamma, float s, "
      "int ignore_index, int reduction) -> (Tensor loss, Tensor saved, Tensor denominators)");
  m.def(
      "native_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor saved, Tensor denominators, "
      "float alpha, float beta, float gamma, float s, int ignore_index, int reduction) -> Tensor");
  // For logits that are the package's own chunks (lmf_kernels/linear.py).
  m.def(
      "native_backward_(Tensor grad_output, Tensor(a!) logits, Tensor target, Tensor saved, Tensor denominators, "
      "float alpha, float beta, float gamma, float s, int ignore_index, int reduction) -> ()");
  m.def(
      "native_sums(Tensor logits, Tensor target, int first_class, "
      "float alpha, float beta, float gamma, float s, int ignore_index, int reduction) -> Tensor");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "What the native extension was built with; importing it registers torch.ops.lmf_kernels.native_*";
  const auto without_gil = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("native_forward", lmf::Dispatched<lmf::Forward>("lmf_kernels::native_forward"), without_gil);
  m.def("native_backward", lmf::Dispatched<lmf::Backward>("lmf_kernels::native_backward"), without_gil);
  m.def("devices", &lmf::devices, "Device types that have native kernels");
  m.def("cpu_capability", &lmf::cpu_capability, "The CPU instruction set in use");
  m.def("cuda_architectures", &lmf::cuda_architectures, "What the CUDA kernels are compiled for; empty without them");
#if defined(LMF_CUDA)
  lmf::cuda::bind(m);
#endif
}
