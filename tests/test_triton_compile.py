"""The Triton kernels compile offline for every supported architecture, without spills, for each regime."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from ptxsim.triton_run import specialise, unwrap

from lmf_kernels import _triton

triton = pytest.importorskip("triton")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
ASTSource = pytest.importorskip("triton.compiler").ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHAPES = {  # regime: logits
    "few": (64, 8),
    "few odd": (64, 7),
    "middle": (16, 1000),
    "large": (4, 128256),
    "dense": (2, 5, 16, 16),
}


def launches(monkeypatch, shape, dtype):
    """What forward and backward would launch: (kernel, plan, arguments, options)."""
    captured = []

    def capture(kernel, device, plan, tensors, scalars, terms, reduction, **options):
        captured.append((kernel, plan, (*tensors, *scalars, plan.tile, terms, reduction), options))

    monkeypatch.setattr(_triton, "_launch", capture)
    logits = torch.zeros(shape, dtype=dtype)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    table = torch.ones(shape[1])
    options = (1.0, 1.0, 1.5, 30.0, -100, 1)
    loss, stats, denominators = _triton.forward(logits, target, table, table, table, None, None, *options)
    _triton.backward(loss, logits, target, stats, denominators, 1.0, 1.0, 30.0)
    return captured


def local_memory(cubin, folder):
    """Bytes of stack and local memory a thread, where spilled registers go."""
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = [tool, "--dump-resource-usage", folder / "kernel.cubin"]
    usage = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    assert found, usage
    return sum(map(int, found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(monkeypatch, tmp_path, target, regime, dtype):
    captured = launches(monkeypatch, SHAPES[regime], dtype)
    assert len(captured) == 2  # one launch each way
    for kernel, plan, arguments, options in captured:
        function = unwrap(kernel)
        values = dict(zip(function.arg_names, arguments, strict=True))
        pointers = {name: v.data_ptr() for name, v in values.items() if isinstance(v, torch.Tensor)}
        signature, constants, attributes = specialise(function, values, pointers, True)
        source = ASTSource(function, signature, constants, attributes)
        compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": plan.num_warps, **options})
        if target.startswith("sm_"):
            assert local_memory(compiled.asm["cubin"], tmp_path) == 0
        else:
            assert ".vgpr_spill_count: 0" in compiled.asm["amdgcn"]
