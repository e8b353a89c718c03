"""Triton's own launcher and the package's direct launch, down to the CUDA driver, without a GPU.

The driver is a stub (`stub_cuda/libcuda.c`) that is compiled here and loaded by another process in place of libcuda.
`launcher_process.py` makes the launches there and compares every argument word with what the call was given.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checks import INTERPRETED

import lmf_kernels

TESTS = Path(__file__).parent
CC = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
nvidia = pytest.importorskip("triton.backends.nvidia")
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler, which the interpreter replaces"),
    pytest.mark.skipif(CC is None, reason="needs a C compiler, as Triton's launcher does"),
]


@pytest.mark.parametrize("amount", ["sample", pytest.param("all", marks=[pytest.mark.slow, pytest.mark.nightly])])
def test_every_argument_word(amount, tmp_path, capsys):
    libcuda = tmp_path / "libcuda.so.1"
    include = Path(nvidia.__file__).with_name("include")  # the cuda.h that Triton compiles its own C with
    flags = ["-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([CC, *flags, f"-I{include}", TESTS / "stub_cuda/libcuda.c", "-o", libcuda], check=True)
    (tmp_path / "libcuda.so").symlink_to(libcuda)
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(lmf_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, TESTS / "launcher_process.py", libcuda, amount]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    with capsys.disabled():
        print("\n" + found.stdout.strip())
