"""Builds the native extension lmf_kernels._C: for setup.py, and for `python -m lmf_kernels build` after installation.

setup.py imports this folder without the package, since neither torch nor the package need be there: nothing here
imports torch at its top. The environment decides what is built:

    LMF_BUILD_NATIVE=0      nothing; =1: a failing build is an error, not an installation without the extension
    LMF_BUILD_CUDA=0        no CUDA kernels; =1: CUDA kernels even where no GPU is visible, and an error without them
    TORCH_CUDA_ARCH_LIST    CUDA kernels for these architectures
    LMF_SANITIZE=1          the CPU kernels with GCC's AddressSanitizer and UndefinedBehaviorSanitizer
    CXX                     the C++ compiler
"""
