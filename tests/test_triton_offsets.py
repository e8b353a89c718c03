"""The last programs of Triton launches over more than 2^31 elements, in the emulator; see test_cuda_offsets.py."""

from __future__ import annotations

import pytest
import torch
from checks import INTERPRETED, assert_exact
from cuda_emulator import Emulator, _size
from oracle import expected
from ptxsim import Device
from ptxsim.memory import Memory
from ptxsim.triton_run import compile_triton, is_tensor, specialise, unwrap

from lmf_kernels._call import NONE, Options, Tables

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler, which the interpreter replaces")
triton_launch = pytest.importorskip("lmf_kernels.triton.launch")
TAIL = 1100  # rows that have memory

SHAPES = {  # contiguous rows
    "flat": (2**31 // 7 + 70, 7),
    "lanes": (2**28 + 70, 8),
    "one row a program": (2**31 // 1000 + 70, 1000),
}


def last_programs(kernel, device, plan, tensors, scalars, terms, reduction):
    """Stands in for a launch: the last programs of it, with memory for the last rows alone."""
    function, emulator = unwrap(kernel), Emulator(tail=TAIL)
    values = dict(zip(function.arg_names, (*tensors, *scalars, plan.tile, terms, reduction), strict=True))
    given = {name: tensor for name, tensor in values.items() if is_tensor(tensor)}
    gpu = Device()
    gpu.mem = Memory(capacity=(1 << 24) + sum(map(_size, given.values())))
    outputs = ("grad_logits",) if "grad_logits" in given else ("loss", "saved")
    placed = {name: emulator._to_device(gpu, name, tensor, name in outputs) for name, tensor in given.items()}
    pointers = {name: pointer for name, (pointer, _) in placed.items()}
    signature, constants, attributes = specialise(function, values, pointers)
    options = {"num_stages": 3, **plan.options}
    compiled = compile_triton(function, signature, constants, attributes, 90, **options)
    arguments = [pointers.get(name, values[name]) for name in function.arg_names if signature[name] != "constexpr"]
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    last = range(max(0, plan.programs - 8), plan.programs)
    gpu.load(compiled.asm["ptx"]).launch(
        compiled.metadata.name, (plan.programs,), threads, arguments, shared, ctas=last
    )
    for name in outputs:
        data = torch.empty(0, dtype=torch.uint8).set_(given[name].untyped_storage())
        for offset, piece in placed[name][1]:
            data[offset : offset + piece.shape[0]] = torch.from_numpy(piece.bits())


@pytest.mark.parametrize("regime", list(SHAPES))
def test_last_programs_of_a_huge_launch(regime, monkeypatch):
    rows, classes = SHAPES[regime]
    device = triton_launch.Device(torch.device("cpu"))
    device.multiprocessors = 1 << 20  # so that a program has the rows of few units
    monkeypatch.setattr(triton_launch, "device_of", lambda _: device)
    monkeypatch.setattr(triton_launch, "_launch", last_programs)
    logits = torch.empty((rows, classes), dtype=torch.bfloat16)
    target = torch.empty(rows, dtype=torch.int64)
    assert logits.numel() > 2**31
    logits[-TAIL:] = torch.randn(TAIL, classes).bfloat16()
    target[-TAIL:] = torch.randint(0, classes, (TAIL,))

    options = Options(1.0, 1.0, 1.5, 30.0, -100, NONE)
    loss, saved, denominators = triton_launch.forward(logits, target, Tables(), options)
    outer = torch.tensor(0.5).expand(rows)
    exact_loss, exact_grad = expected(
        logits[-5:].clone(), target[-5:].clone(), reduction="none", grad_output=torch.full((5,), 0.5)
    )
    assert_exact(loss[-5:], exact_loss, "loss")
    grad = triton_launch.backward(outer, logits, target, saved, denominators, options)
    assert_exact(grad[-5:], exact_grad, "gradient")
