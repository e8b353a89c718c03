"""The extension as setuptools builds it: sources, flags, and what happens where it cannot be built."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from . import record
from .environment import find_torch
from .record import Record
from .toolkit import NVCC_FLAGS, NoToolkit, Toolkit, find_toolkit

NAME = "lmf_kernels._C"
FILE = "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
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
    "csrc/lmf_cuda_row_sums.cu",
    "csrc/lmf_cuda_plan.cpp",
    "csrc/lmf_cuda_call.cpp",
    "csrc/lmf_cuda.cpp",
]
# No errno and no traps: the kernels' selects may then be computed on both sides. NaN and infinity keep their meaning.
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]
# Later flags win. Any finding ends the process, so that no test passes over one.
SANITIZE_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZE_FLAGS += ["-Wno-maybe-uninitialized"]  # GCC's own AVX-512 intrinsics


class NotBuilt(Exception):
    """There will be no extension, or one without CUDA; the message says why, in a few words."""


def say(message: str) -> None:
    print(f"lmf_kernels: {message}", file=sys.stderr, flush=True)


def wanted(variable: str) -> bool | None:
    """What an environment variable says: "1" True, "0" False, nothing None."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        sys.exit(f"lmf_kernels: {variable} must be 0, 1 or unset, got {value!r}")
    return None if value == "" else value == "1"


def find_compiler() -> str:
    """The C++ compiler that torch's build will run.

    Raises:
        NotBuilt: there is none, or it does not know C++20.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((name for name in names if shutil.which(name.split()[0])), None)
    if compiler is None:
        raise NotBuilt(f"no C++ compiler was found ({' or '.join(names)})")
    test = [*compiler.split(), "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull]
    if subprocess.run(test, capture_output=True).returncode:
        raise NotBuilt(f"the C++ compiler {compiler} does not know -std=c++20")
    return compiler


def cuda_toolkit() -> tuple[Toolkit, str]:
    """The toolkit to build the CUDA kernels with, and for which architectures: those asked for, or of visible GPUs.

    Raises:
        NotBuilt: nobody asked for CUDA kernels, or they cannot be built. SystemExit if they were insisted on.
    """
    import torch

    wish, asked = wanted("LMF_BUILD_CUDA"), os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wish is False:
        raise NotBuilt("LMF_BUILD_CUDA=0")
    try:
        if torch.version.cuda is None:
            raise NoToolkit("this torch was built without CUDA")
        visible = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        if not (wish or asked or visible):
            raise NotBuilt("no GPU was visible during the build (LMF_BUILD_CUDA=1 builds them all the same)")
        toolkit = find_toolkit(torch.version.cuda)
    except NoToolkit as reason:
        if wish:
            sys.exit(f"lmf_kernels: LMF_BUILD_CUDA=1, but {reason}")
        raise NotBuilt(str(reason)) from None
    capabilities = sorted({torch.cuda.get_device_capability(index) for index in visible})
    own = ";".join(f"{major}.{minor}" for major, minor in capabilities)
    return toolkit, asked or own or toolkit.architectures


def extension() -> tuple[Any, Record]:
    """The setuptools extension, and the record of it once it is built.

    Raises:
        NotBuilt: it cannot be built here.
    """
    if wanted("LMF_BUILD_NATIVE") is False:
        raise NotBuilt("LMF_BUILD_NATIVE=0")
    if not find_torch():
        raise NotBuilt("torch was not importable where the package was built")
    os.environ["CXX"] = find_compiler()
    import torch
    from torch.utils import cpp_extension

    sanitizers = SANITIZE_FLAGS if wanted("LMF_SANITIZE") else []
    options: dict[str, Any] = {
        "extra_compile_args": {"cxx": CXX_FLAGS + sanitizers},
        "extra_link_args": ["-fopenmp", *sanitizers],
    }
    sources, found = CPU_SOURCES, Record(torch=torch.__version__)
    try:
        if sanitizers:
            raise NotBuilt("LMF_SANITIZE=1")
        toolkit, architectures = cuda_toolkit()
    except NotBuilt as reason:
        found = found._replace(why_no_cuda=str(reason))
    else:
        found = found._replace(cuda=architectures)
        cpp_extension.CUDA_HOME = str(toolkit.home)  # torch takes a wrong one where nvcc on PATH is a script
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        sources = CUDA_SOURCES + CPU_SOURCES
        # Not CUDAExtension: it links with -lcudart, which the packages from PyPI do not have under that name.
        options["include_dirs"] = [str(toolkit.home / "include")]
        options["libraries"] = ["c10_cuda", "torch_cuda"]
        options["extra_link_args"].append(str(toolkit.runtime))
        options["extra_compile_args"]["nvcc"] = NVCC_FLAGS
        options["define_macros"] = [("LMF_CUDA", f'"{architectures}"')]
    return cpp_extension.CppExtension(NAME, sources, **options), found


def leave_none(package: Path, outcome: Record) -> None:
    """Records why there is no extension; one of an earlier build, of other sources, must not be taken for this one's."""
    say(f"no native kernels: {outcome.why_not}")
    (package / FILE).unlink(missing_ok=True)
    record.write(package, outcome)


def setup_arguments() -> dict[str, Any]:
    """What setup() is given: the extension where it can be built, and the commands that build it and leave a record."""
    from setuptools.command.build_py import build_py

    try:
        native, built = extension()
    except NotBuilt as reason:
        if wanted("LMF_BUILD_NATIVE"):
            sys.exit(f"lmf_kernels: the native kernels cannot be built: {reason}")
        native, built = None, Record(why_not=str(reason))

    class BuildPython(build_py):
        """With csrc/, for `python -m lmf_kernels build`."""

        def run(self) -> None:
            super().run()
            folder = Path("lmf_kernels" if self.editable_mode else f"{self.build_lib}/lmf_kernels")
            if not self.editable_mode:
                shutil.copytree("csrc", folder / "_build" / "csrc", dirs_exist_ok=True)
            if native is None:
                leave_none(folder, built)

    commands: dict[str, Any] = {"build_py": BuildPython}
    if native is None:
        return {"cmdclass": commands}
    from torch.utils.cpp_extension import BuildExtension

    class BuildNative(BuildExtension):
        """A build that fails leaves the installation without the extension, unless LMF_BUILD_NATIVE=1 insists."""

        def run(self) -> None:
            outcome = built
            cuda = f"CUDA kernels for {built.cuda}" if built.cuda else f"no CUDA kernels: {built.why_no_cuda}"
            say(f"building the CPU kernels for torch {built.torch}; {cuda}")
            try:
                super().run()
            except (Exception, SystemExit) as error:  # whatever compilers, ninja and torch's checks raise
                if wanted("LMF_BUILD_NATIVE"):
                    raise
                lines = str(error).strip().splitlines() or [type(error).__name__]
                outcome = Record(why_not=f"the build failed: {lines[0]}")
                self.extensions: list[Any] = []
            folder = Path(self.get_ext_fullpath(NAME)).parent
            if outcome.torch:
                record.write(folder, outcome)
            else:
                leave_none(folder, outcome)

    commands["build_ext"] = BuildNative
    return {"ext_modules": [native], "cmdclass": commands}
