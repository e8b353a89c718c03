"""Finds the CUDA toolkit that the extension is built with."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONVENTIONAL = Path("/usr/local/cuda")
# Subnormal results of exp2f become 0: they are far below what the loss promises, and cost three instructions each.
NVCC_FLAGS = ["-O3", "-std=c++17", "-ftz=true", "--expt-relaxed-constexpr"]


class NoToolkit(Exception):
    """No usable toolkit; the message says why, in one sentence."""


@dataclass(frozen=True)
class Toolkit:
    home: Path  # has bin/nvcc and the headers
    runtime: Path  # the runtime library to link with
    version: tuple[int, int]

    @property
    def nvcc(self) -> Path:
        return _nvcc(self.home)

    @property
    def architectures(self) -> str:
        """What is compiled where CUDA kernels are asked for, no architecture is named and no GPU is visible."""
        return "8.0;9.0;10.0+PTX" if self.version >= (12, 8) else "8.0;9.0+PTX"


def find_toolkit(torch_cuda: str) -> Toolkit:
    """The first usable toolkit of torch's CUDA major version `torch_cuda` ("13.0").

    Looks in CUDA_HOME, in the conventional folder, beside the nvcc on PATH, and in the packages from PyPI.

    Raises:
        NoToolkit: there is none, or those that there are have another major version.
    """
    refused = None
    for home in _candidates(torch_cuda):
        runtime = _runtime(home)
        if runtime is None or not _nvcc(home).exists() or not _has_headers(home / "include"):
            continue
        version = _version(_nvcc(home))
        if version is not None and version[0] == int(torch_cuda.split(".")[0]):
            return Toolkit(home, runtime, version)
        refused = refused or (home, version)
    if refused is None:
        raise NoToolkit("no complete CUDA toolkit found (set CUDA_HOME)")
    home, version = refused
    found = "of unknown version" if version is None else f"{version[0]}.{version[1]}"
    raise NoToolkit(f"the CUDA toolkit in {home} is {found}, but torch was built with CUDA {torch_cuda}")


def _candidates(torch_cuda: str) -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    yield CONVENTIONAL
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parent.parent
        top = _top(nvcc)  # nvcc may be a script that runs the real one
        if top is not None:
            yield top
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations or () if nvidia else ():
        yield Path(folder) / f"cu{torch_cuda.split('.')[0]}"


def _nvcc(home: Path) -> Path:
    return home / "bin" / ("nvcc.exe" if sys.platform == "win32" else "nvcc")


def _has_headers(include: Path) -> bool:
    """cuda_runtime.h, and what cuda_fp16.h includes: a package of its own (nvidia-cuda-cccl) on PyPI."""
    target = ("nv/target", "cccl/nv/target")
    return (include / "cuda_runtime.h").exists() and any((include / file).exists() for file in target)


def _runtime(home: Path) -> Path | None:
    """libcudart; the packages from PyPI have it under its full name alone."""
    patterns = ("lib/x64/cudart.lib",) if sys.platform == "win32" else ("lib64/libcudart.so*", "lib/libcudart.so*")
    return next((file for pattern in patterns for file in sorted(home.glob(pattern))), None)


def _output(*command: str | Path) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout + run.stderr


def _version(nvcc: Path) -> tuple[int, int] | None:
    match = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    return (int(match[1]), int(match[2])) if match else None


def _top(nvcc: str) -> Path | None:
    match = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
    return Path(match[1]).resolve() if match else None
