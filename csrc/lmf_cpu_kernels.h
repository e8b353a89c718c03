// The vectorised CPU kernels, included once for each instruction set (see simd.h for LMF_ISA).
#pragma once

#include "lmf_cpu_backward.h"
#include "lmf_cpu_forward.h"
#include "lmf_cpu_row_sums.h"

#define LMF_KERNELS_OF(FUNCTION)                                                               \
  {lmf::LMF_ISA::FUNCTION<lmf::LMF_ISA::Half>, lmf::LMF_ISA::FUNCTION<lmf::LMF_ISA::BFloat16>, \
   lmf::LMF_ISA::FUNCTION<float>, lmf::LMF_ISA::FUNCTION<double>}
#define LMF_KERNEL_TABLE(NAME) {NAME, LMF_KERNELS_OF(forward), LMF_KERNELS_OF(backward), LMF_KERNELS_OF(sums)}
