// The CPU kernels compiled for avx512.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define LMF_ISA avx512
#define LMF_VECTOR_BYTES 64

#include "lmf_cpu_kernels.h"

const lmf::Kernels lmf::kKernelsAvx512 = LMF_KERNEL_TABLE("avx512");

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
