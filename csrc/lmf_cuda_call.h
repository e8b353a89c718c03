// From tensors to a launch. Nothing here needs a GPU: tests run it on CPU tensors and hand the launch to an emulator.
#pragma once

#include <vector>

#include "lmf.h"
#include "lmf_cuda.h"

namespace lmf {
namespace cuda {

struct Coefficients {
  double alpha, beta, gamma, s;
};

struct ForwardCall {
  ForwardCall(const at::Tensor& logits, const at::Tensor& target, const Tables& tables,
              const Coefficients& coefficients, int64_t ignore_index, int64_t reduction, int multiprocessors);
  bool needed() const { return params.work.rows.count > 0 || params.reduction != kNone; }
  // Several blocks that hand something over to the last of them.
  bool needs_counter() const { return partials_.defined(); }
  // What the pointers of `params` point to, in their order; the counter is not among them.
  std::vector<at::Tensor> tensors() const;

  ForwardParams params{};
  Launch launch;
  ForwardResult result;

 private:
  at::Tensor logits_, target_, partials_;
  std::vector<at::Tensor> tables_;
};

struct SumsCall {
  SumsCall(const at::Tensor& logits, const at::Tensor& target, int64_t first_class, int64_t ignore_index, double alpha,
           double beta, double s, int multiprocessors);
  bool needed() const { return params.work.rows.count > 0; }
  bool needs_counter() const { return partials_.defined(); }
  std::vector<at::Tensor> tensors() const { return {logits_, target_, result, partials_}; }

  SumsParams params{};
  Launch launch;
  at::Tensor result;

 private:
  at::Tensor logits_, target_, partials_;
};

// The gradient goes to `result`, which may be the logits.
struct BackwardCall {
  BackwardCall(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
               const at::Tensor& saved, const at::Tensor& denominators, double alpha, double beta, double s,
               const at::Tensor& result, int multiprocessors);
  bool needed() const { return params.work.rows.count > 0; }
  std::vector<at::Tensor> tensors() const { return {grad_output_, logits_, target_, stats_, denominators_, grad_}; }
  // What is left to do once the launch is enqueued.
  void finish() const;

  BackwardParams params{};
  Launch launch;

 private:
  at::Tensor grad_output_, logits_, target_, stats_, denominators_, grad_, result_;
};

}  // namespace cuda
}  // namespace lmf
