"""The built CUDA library: no spills, what it holds, and the ops on fake CUDA tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cuda_emulator import ROOT, needs_cuda_build, ptx
from cuda_resources import cuobjdump, resources
from torch._subclasses import FakeTensorMode

import lmf_kernels
from lmf_kernels import _backends, _ops, lmf_loss
from lmf_kernels._call import Options, Tables

pytestmark = needs_cuda_build


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump, of a CUDA toolkit or of Triton")
def test_no_kernel_spills_or_uses_local_memory(capsys):
    table = resources()
    architectures = set(re.findall(r"\d+\.\d+", _ops._C.cuda_architectures()))
    assert {arch for arch, _ in table} == {arch.replace(".", "") for arch in architectures}
    assert len(table) == len(architectures) * 95
    with capsys.disabled():
        for (arch, kernel), (registers, stack, local) in sorted(table.items()):
            if stack or local:
                print(f"sm_{arch} {kernel}: {registers} registers, stack {stack}, local {local}")
    assert all(stack == 0 and local == 0 and registers <= 255 for registers, stack, local in table.values())


def test_library_size():
    assert Path(_ops._C.__file__).stat().st_size < 20e6


def test_cuda_files_include_no_tensor_library():
    for file in (ROOT / "csrc").glob("*.cu*"):
        assert not re.search(r"#include <(ATen|c10|torch)", file.read_text()), file


@pytest.mark.parametrize("step", ["forward", "backward", "sums"])
def test_rows_are_finished_with_accurate_functions(step):
    """No lg2.approx (wrong near 1) and no other fast-math; only the exponentials of elements are approximate."""
    for name, text in ptx(step, 90).items():
        approximate = set(re.findall(r"\b(\w+\.approx[\w.]*)", text))
        assert approximate <= {"ex2.approx.ftz.f32", "rcp.approx.ftz.f64"}, (name, approximate)
        assert "div.full" not in text


def test_logits_are_not_read_through_the_read_only_cache():
    """Their gradient may lie where they are."""
    assert not any("ld.global.nc" in text for text in ptx("backward", 90).values())


def fake(shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loss_and_gradient_of_fake_cuda_tensors(reduction, dtype):
    """Without a GPU, autograd's engine does not run for CUDA tensors of any kind: its node and the op are asked."""
    with FakeTensorMode():
        logits, target = fake((4, 5, 3), dtype).transpose(0, 2).requires_grad_(), fake((3, 4), torch.int64)
        loss = lmf_loss(logits, target, reduction=reduction, weight=fake((5,)), backend="native")
        assert loss.device.type == "cuda" and loss.shape == (target.shape if reduction == "none" else ())
        assert loss.requires_grad and "FusedLoss" in loss.grad_fn.name()
        _, saved, denominators = forward_op(logits, target, reduction)
        options = options_of(reduction)
        grad = _ops.OPS["native"].backward(torch.ones_like(loss), logits, target, saved, denominators, *options)
        assert grad.device == logits.device and grad.dtype == dtype
        assert grad.stride() == torch.empty_like(logits).stride()


def forward_op(logits, target, reduction="mean"):
    return _ops.OPS["native"].forward(logits, target, *Tables(), *options_of(reduction))


def options_of(reduction):
    return Options(1.0, 1.0, 1.5, 30.0, -100, ("none", "mean", "sum").index(reduction))


def test_ops_have_cuda_kernels_and_pass_opcheck_as_far_as_it_goes_without_a_gpu():
    forward, backward, *_ = _ops.OPS["native"]
    for op in _ops.OPS["native"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA")
    assert "cuda" in lmf_kernels._ops._C.devices()
    assert "native" in _backends.available_backends(torch.device("cuda"))
    with FakeTensorMode():
        logits, target = fake((4, 5)).requires_grad_(), fake((4,), torch.int64)
        options = options_of("mean")
        arguments = (logits, target, *Tables(ldam_weight=fake((5,))), *options)
        torch.library.opcheck(forward, arguments, test_utils="test_autograd_registration")
        loss, saved, denominators = forward(*arguments)
        arguments = (torch.ones_like(loss), logits, target, saved, denominators, *options)
        torch.library.opcheck(backward, arguments, test_utils="test_autograd_registration")


def test_sums_and_gradient_over_fake_cuda_logits():
    """As in memory estimates."""
    *_, backward_, sums = _ops.OPS["native"]
    with FakeTensorMode():
        logits, target = fake((4, 5, 3), torch.bfloat16), fake((4, 3), torch.int64)
        result = sums(logits, target, 0, *options_of("sum"))
        assert result.shape == (4, 12) and result.dtype == torch.float32 and result.device == logits.device
        assert backward_(fake(()), logits, target, fake((5, 12)), fake((0,)), *options_of("sum")) is None


def test_graph_of_cuda_tensors_holds_one_op():
    """What torch.export and torch.compile see."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        graph = make_fx(lambda z, y: forward_op(z, y))(fake((4, 5)), fake((4,), torch.int64)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function" and "get" not in str(node.target)] == [
        _ops.OPS["native"].forward
    ]
