// The CPU kernels compiled for what every CPU of the architecture has (SSE2 on x86-64, NEON on aarch64).
#define LMF_ISA baseline
#define LMF_VECTOR_BYTES 16

#include "lmf_cpu_kernels.h"

const lmf::Kernels lmf::kKernelsBaseline = LMF_KERNEL_TABLE("baseline");
