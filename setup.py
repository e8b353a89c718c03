"""Builds the native extension lmf_kernels._C; everything else about the package is in pyproject.toml.

LMF_BUILD_CUDA=0 leaves the CUDA kernels out, LMF_BUILD_CUDA=1 insists on them; otherwise they are built where a CUDA
toolkit is found that fits torch. TORCH_CUDA_ARCH_LIST chooses the architectures. LMF_SANITIZE=1 builds the CPU kernels
with GCC's AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize`.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))
from cuda_toolkit import NVCC_FLAGS, NoToolkit, Toolkit, find_toolkit

CPU_SOURCES = [
    "csrc/lmf.cpp",
    "csrc/lmf_cpu.cpp",
    "csrc/lmf_cpu_baseline.cpp",
    "csrc/lmf_cpu_avx2.cpp",
    "csrc/lmf_cpu_avx512.cpp",
]
CUDA_SOURCES = [  # the longest to compile first
    "csrc/lmf_cuda_forward.cu",
    "csrc/lmf_cuda_backward.cu",
    "csrc/lmf_cuda_statistics.cu",
    "csrc/lmf_cuda_plan.cpp",
    "csrc/lmf_cuda_call.cpp",
    "csrc/lmf_cuda.cpp",
]
# No errno and no traps: the kernels' selects may then be computed on both sides. NaN and infinity keep their meaning.
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]
# Later flags win. Any finding ends the process, so that no test passes over one.
SANITIZE_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZE_FLAGS += ["-Wno-maybe-uninitialized"]  # GCC's own AVX-512 intrinsics


def say(message):
    print(f"lmf_kernels: {message}", file=sys.stderr)


def cuda_toolkit() -> Toolkit | None:
    """The toolkit to build the CUDA kernels with, or None (with one line that says why)."""
    import torch

    wish = os.environ.get("LMF_BUILD_CUDA", "")
    if wish == "0":
        return None
    try:
        if torch.version.cuda is None:
            raise NoToolkit("this torch was built without CUDA")
        return find_toolkit(torch.version.cuda)
    except NoToolkit as reason:
        if wish == "1":
            sys.exit(f"lmf_kernels: LMF_BUILD_CUDA=1, but {reason}")
        say(f"building without CUDA kernels: {reason}")
        return None


def native_extension():
    """The extension, or nothing (with one line that says why) where it cannot be built."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        say("torch is not importable here (use --no-build-isolation); no native kernels")
        return {}
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        say("no C++ compiler found; installing without the native kernels")
        return {}
    sanitizers = SANITIZE_FLAGS if os.environ.get("LMF_SANITIZE") == "1" else []
    options = {
        "extra_compile_args": {"cxx": CXX_FLAGS + sanitizers},
        "extra_link_args": ["-fopenmp", *sanitizers],
    }
    sources = CPU_SOURCES
    toolkit = None if sanitizers else cuda_toolkit()
    if toolkit is not None:
        cpp_extension.CUDA_HOME = str(toolkit.home)  # torch takes a wrong one where nvcc on PATH is a script
        os.environ["TORCH_CUDA_ARCH_LIST"] = toolkit.architectures
        say(f"building CUDA kernels for {toolkit.architectures} with the toolkit in {toolkit.home}")
        sources = CUDA_SOURCES + CPU_SOURCES
        # Not CUDAExtension: it links with -lcudart, which the packages from PyPI do not have under that name.
        options["include_dirs"] = [str(toolkit.home / "include")]
        options["libraries"] = ["c10_cuda", "torch_cuda"]
        options["extra_link_args"].append(str(toolkit.runtime))
        options["extra_compile_args"]["nvcc"] = NVCC_FLAGS
        options["define_macros"] = [("LMF_CUDA", f'"{toolkit.architectures}"')]
    extension = cpp_extension.CppExtension("lmf_kernels._C", sources, **options)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**native_extension())
