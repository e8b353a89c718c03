// The native ops on CUDA tensors: parameters of the kernels, the counters of the one-launch reduction, the launches.

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <array>
#include <functional>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "lmf_cuda_call.h"

namespace lmf {
namespace cuda {

// ---- counters ------------------------------------------------------------------------------------------------------

// Zeroed counters of one device, which every launch leaves at zero. Two launches that may run at the same time must
// not share one: launches on one stream run one after the other and share the stream's; a launch that is captured into
// a graph takes one for ever, because graphs may be replayed side by side and on any stream.
class Counters {
 public:
  Counter* take(c10::cuda::CUDAStream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool captured = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
    if (!captured) {
      if (left() < kSlab / 2) allocate(stream);
      const auto found = of_stream_.emplace(stream.stream(), nullptr);
      if (found.second) found.first->second = next();
      return found.first->second;
    }
    TORCH_CHECK(left() > 0,
                "lmf_kernels has no counters left to capture into a CUDA graph: run the loss once on this device "
                "outside of the capture (warm up) first");
    return next();
  }

 private:
  static constexpr int64_t kSlab = 1 << 15;

  int64_t left() const { return slabs_.empty() ? 0 : kSlab - used_; }
  Counter* next() { return reinterpret_cast<Counter*>(slabs_.back().mutable_data_ptr<int64_t>()) + used_++; }
  // Waits for the zeros, as other streams may be the first to use them; happens once in thousands of captures. What is
  // left of the slab before stays unused.
  void allocate(c10::cuda::CUDAStream stream) {
    slabs_.push_back(at::zeros({kSlab}, at::TensorOptions().device(stream.device()).dtype(at::kLong)));
    used_ = 0;
    stream.synchronize();
  }

  std::mutex mutex_;
  std::vector<at::Tensor> slabs_;
  int64_t used_ = 0;  // of the last slab
  std::unordered_map<cudaStream_t, Counter*> of_stream_;
};

static Counters& counters_of(c10::DeviceIndex device) {
  // Never destroyed: the CUDA driver may be gone by then.
  static auto& all = *new std::array<Counters, C10_COMPILE_TIME_MAX_GPUS>;
  return all.at(device);
}

// ---- the ops -------------------------------------------------------------------------------------------------------

static int multiprocessors(const at::Tensor& t) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.device().index()));
  return count;
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cuda(
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& margins,
    const std::optional<at::Tensor>& ldam_weight, const std::optional<at::Tensor>& focal_weight,
    const std::optional<at::Tensor>& ldam_normalizer, const std::optional<at::Tensor>& focal_normalizer, double alpha,
    double beta, double gamma, double s, int64_t ignore_index, int64_t reduction) {
  const Tables tables{margins, ldam_weight, focal_weight, ldam_normalizer, focal_normalizer};
  check_forward(logits, target, tables, reduction);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  ForwardCall call(logits, target, tables, {alpha, beta, gamma, s}, ignore_index, reduction, multiprocessors(logits));
  if (call.needed()) {
    if (call.needs_counter()) call.params.counter = counters_of(logits.device().index()).take(stream);
    C10_CUDA_CHECK(launch_forward(call.launch, call.params, stream));
  }
  return {call.result.loss, call.result.saved, call.result.denominators};
}

static at::Tensor sums_cuda(const at::Tensor& logits, const at::Tensor& target, int64_t first_class, double alpha,
                            double beta, double gamma, double s, int64_t ignore_index, int64_t reduction) {
  check_pair(logits, target);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  SumsCall call(logits, target, first_class, ignore_index, alpha, beta, s, multiprocessors(logits));
  if (call.needed()) {
    if (call.needs_counter()) call.params.counter = counters_of(logits.device().index()).take(stream);
    C10_CUDA_CHECK(launch_sums(call.launch, call.params, stream));
  }
  return call.result;
}

static void write_gradient(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                           const at::Tensor& saved, const at::Tensor& denominators, double alpha, double beta,
                           double gamma, double s, int64_t ignore_index, int64_t reduction, const at::Tensor& result) {
  check_backward(grad_output, logits, target, saved, denominators, reduction);
  const c10::cuda::CUDAGuard guard(logits.device());
  BackwardCall call(grad_output, logits, target, saved, denominators, alpha, beta, s, result, multiprocessors(logits));
  if (call.needed()) {
    C10_CUDA_CHECK(launch_backward(call.launch, call.params, c10::cuda::getCurrentCUDAStream()));
  }
  call.finish();
}

static at::Tensor backward_cuda(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                                const at::Tensor& saved, const at::Tensor& denominators, double alpha, double beta,
                                double gamma, double s, int64_t ignore_index, int64_t reduction) {
  const at::Tensor result = at::empty_like(logits);
  write_gradient(grad_output, logits, target, saved, denominators, alpha, beta, gamma, s, ignore_index, reduction,
                 result);
  return result;
}

static void backward_in_place_cuda(const at::Tensor& grad_output, at::Tensor& logits, const at::Tensor& target,
                                   const at::Tensor& saved, const at::Tensor& denominators, double alpha, double beta,
                                   double gamma, double s, int64_t ignore_index, int64_t reduction) {
  write_gradient(grad_output, logits, target, saved, denominators, alpha, beta, gamma, s, ignore_index, reduction,
                 logits);
}

// ---- the same calls without a GPU -----------------------------------------------------------------------------------

// Receives what would be launched: the kernel's name and template arguments, (blocks, threads, shared bytes), the bytes
// of its parameters, and the tensors that the pointers at their beginning point to.
using OnLaunch = std::function<void(const std::string&, std::array<unsigned, 3>, pybind11::bytes,
                                    const std::vector<std::optional<at::Tensor>>&)>;

template <typename Params>
static void report(const OnLaunch& on_launch, const char* step, const Launch& launch, const Params& params,
                   const std::vector<at::Tensor>& tensors) {
  static const char* const regimes[] = {"flat", "rows", "pixels", "planes"};
  static const char* const elements[] = {"half", "bfloat16", "float", "double"};
  std::string name = std::string(step) + "_" + regimes[static_cast<int>(launch.regime)] + " " +
                     elements[static_cast<int>(launch.element)] + " " + std::to_string(launch.width) + " " +
                     std::to_string(launch.exponentials);
  std::vector<std::optional<at::Tensor>> given;
  for (const at::Tensor& tensor : tensors) given.push_back(tensor.defined() ? std::optional(tensor) : std::nullopt);
  on_launch(name, {launch.blocks, launch.threads, launch.shared_bytes},
            pybind11::bytes(reinterpret_cast<const char*>(&params), sizeof(params)), given);
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor> trace_forward(
    const OnLaunch& on_launch, int multiprocessors, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& margins, const std::optional<at::Tensor>& ldam_weight,
    const std::optional<at::Tensor>& focal_weight, const std::optional<at::Tensor>& ldam_normalizer,
    const std::optional<at::Tensor>& focal_normalizer, double alpha, double beta, double gamma, double s,
    int64_t ignore_index, int64_t reduction) {
  const Tables tables{margins, ldam_weight, focal_weight, ldam_normalizer, focal_normalizer};
  check_forward(logits, target, tables, reduction);
  ForwardCall call(logits, target, tables, {alpha, beta, gamma, s}, ignore_index, reduction, multiprocessors);
  if (call.needed()) report(on_launch, "forward", call.launch, call.params, call.tensors());
  return {call.result.loss, call.result.saved, call.result.denominators};
}

static at::Tensor trace_sums(const OnLaunch& on_launch, int multiprocessors, const at::Tensor& logits,
                             const at::Tensor& target, int64_t first_class, double alpha, double beta, double gamma,
                             double s, int64_t ignore_index, int64_t reduction) {
  check_pair(logits, target);
  SumsCall call(logits, target, first_class, ignore_index, alpha, beta, s, multiprocessors);
  if (call.needed()) report(on_launch, "sums", call.launch, call.params, call.tensors());
  return call.result;
}

static void trace_gradient(const OnLaunch& on_launch, int multiprocessors, const at::Tensor& grad_output,
                           const at::Tensor& logits, const at::Tensor& target, const at::Tensor& saved,
                           const at::Tensor& denominators, double alpha, double beta, double gamma, double s,
                           int64_t ignore_index, int64_t reduction, const at::Tensor& result) {
  check_backward(grad_output, logits, target, saved, denominators, reduction);
  BackwardCall call(grad_output, logits, target, saved, denominators, alpha, beta, s, result, multiprocessors);
  if (call.needed()) report(on_launch, "backward", call.launch, call.params, call.tensors());
  call.finish();
}

static at::Tensor trace_backward(const OnLaunch& on_launch, int multiprocessors, const at::Tensor& grad_output,
                                 const at::Tensor& logits, const at::Tensor& target, const at::Tensor& saved,
                                 const at::Tensor& denominators, double alpha, double beta, double gamma, double s,
                                 int64_t ignore_index, int64_t reduction) {
  const at::Tensor result = at::empty_like(logits);
  trace_gradient(on_launch, multiprocessors, grad_output, logits, target, saved, denominators, alpha, beta, gamma, s,
                 ignore_index, reduction, result);
  return result;
}

static void trace_backward_in_place(const OnLaunch& on_launch, int multiprocessors, const at::Tensor& grad_output,
                                    const at::Tensor& logits, const at::Tensor& target, const at::Tensor& saved,
                                    const at::Tensor& denominators, double alpha, double beta, double gamma, double s,
                                    int64_t ignore_index, int64_t reduction) {
  trace_gradient(on_launch, multiprocessors, grad_output, logits, target, saved, denominators, alpha, beta, gamma, s,
                 ignore_index, reduction, logits);
}

void bind(pybind11::module_& m) {
  m.def("trace_cuda_forward", &trace_forward, "native_forward on CPU tensors; the launch goes to a function");
  m.def("trace_cuda_backward", &trace_backward, "native_backward on CPU tensors; the launch goes to a function");
  m.def("trace_cuda_backward_", &trace_backward_in_place, "native_backward_, likewise");
  m.def("trace_cuda_sums", &trace_sums, "native_sums, likewise");
}

}  // namespace cuda
}  // namespace lmf

TORCH_LIBRARY_IMPL(lmf_kernels, CUDA, m) {
  m.impl("native_forward", &lmf::cuda::forward_cuda);
  m.impl("native_backward", &lmf::cuda::backward_cuda);
  m.impl("native_backward_", &lmf::cuda::backward_in_place_cuda);
  m.impl("native_sums", &lmf::cuda::sums_cuda);
}
