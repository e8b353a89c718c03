"""Runs the backend tests on the Triton kernels in Triton's interpreter, which takes a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checks import INTERPRETED

ROOT = Path(__file__).parents[1]
FILES = (  # the longest first
    "test_backward.py",
    "test_precision.py",
    "test_linear.py",
    "test_layouts.py",
    "test_row_sums.py",
    "test_pairwise.py",
    "test_edges.py",
    "test_reductions.py",
    "test_errors.py",
    "test_ops.py",
    "test_properties.py",
    "test_fuzz.py",
)


def run_interpreted(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("LMF_TEST_BACKENDS", None)
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "triton"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/{file}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs():
    """File name -> its run, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run_interpreted, file) for file in FILES}
        pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
@pytest.mark.parametrize("file", FILES)
def test_triton_in_the_interpreter(file, runs):
    run = runs[file].result()
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
@pytest.mark.parametrize("file", ["test_autograd_modes.py", "test_compile.py"])
def test_integration_with_triton_in_the_interpreter(file):
    """What these files test is in front of the kernels and the same for all of them."""
    run = run_interpreted(file)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
