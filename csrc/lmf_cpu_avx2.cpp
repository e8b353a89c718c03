// The CPU kernels compiled for avx2.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LMF_ISA avx2
#define LMF_VECTOR_BYTES 32

#include "lmf_cpu_kernels.h"

const lmf::Kernels lmf::kKernelsAvx2 = LMF_KERNEL_TABLE("avx2");

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
