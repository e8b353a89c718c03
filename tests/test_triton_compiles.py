"""Every Triton kernel of the table compiles for sm_90 in whatever version is there; test_gpu_limits.py has its cost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checks import INTERPRETED

pytestmark = [
    pytest.mark.slow,  # `make test-versions` asks for it by name
    pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler, which the interpreter replaces"),
]
pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gpu_offline import CASES, compiled, kernels  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("error")  # Triton 3.9 warns where fusion is left to its default
def test_forward_and_backward(case, dtype):
    for step, kernel in kernels(case, dtype).items():
        binary = compiled(kernel, "sm_90")
        assert f".entry {step}_kernel" in binary.asm["ptx"] and ".target sm_90a" in binary.asm["ptx"]
        assert binary.asm["cubin"].startswith(b"\x7fELF")
