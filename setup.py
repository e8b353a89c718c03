"""Builds the native extension lmf_kernels._C; everything else about the package is in pyproject.toml."""

import shutil
import sys

from setuptools import setup

CPU_SOURCES = [
    "csrc/lmf.cpp",
    "csrc/lmf_cpu.cpp",
    "csrc/lmf_cpu_baseline.cpp",
    "csrc/lmf_cpu_avx2.cpp",
    "csrc/lmf_cpu_avx512.cpp",
]
# No errno and no traps: the kernels' selects may then be computed on both sides. NaN and infinity keep their meaning.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]


def native_extension():
    """The extension, or nothing (with one line that says why) where it cannot be built."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print(
            "lmf_kernels: torch is not importable here (use --no-build-isolation); no native kernels", file=sys.stderr
        )
        return {}
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("lmf_kernels: no C++ compiler found; installing without the native kernels", file=sys.stderr)
        return {}
    extension = CppExtension(
        "lmf_kernels._C", CPU_SOURCES, extra_compile_args={"cxx": CXX_FLAGS}, extra_link_args=["-fopenmp"]
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**native_extension())
