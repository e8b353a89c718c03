"""10,000 malformed calls return or raise a documented error, and the bugs that they found."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import INTERPRETED, check
from fuzz import Subclass, Wrapper

from lmf_kernels import FocalLoss, LMFLoss, _ops, class_counts, effective_number_weights, ldam_margins, lmf_loss
from lmf_kernels._native import _C

FUZZ = Path(__file__).with_name("fuzz.py")
Z, Y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])

native_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no native kernels")


def run_fuzz(first, count, progress):
    environment = {**os.environ, "LMF_FUZZ_PROGRESS": str(progress)}
    command = [sys.executable, str(FUZZ), str(first), str(count)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = progress.read_text()
    assert run.returncode in (0, 1), f"call {last} ended the process with {run.returncode}: {run.stderr[-3000:]}"
    report = json.loads(run.stdout.splitlines()[-1])
    assert not report["complaints"], "\n".join(report["complaints"][:20])
    return report


@native_only
@pytest.mark.slow
def test_malformed_calls(tmp_path):
    report = run_fuzz(0, 10_000, tmp_path / "progress")
    outcomes = report["outcomes"]
    assert report["calls"] == 10_000 and outcomes["valid calls"] == 500
    assert all(outcomes[name] > 200 for name in ("TypeError", "ValueError", "RuntimeError", "IndexError"))


@native_only
def test_a_few_malformed_calls(tmp_path):
    run_fuzz(100_000, 200, tmp_path / "progress")


def released(t, bytes_left=0):
    t = t.clone()
    t.untyped_storage().resize_(bytes_left)
    return t


@pytest.mark.parametrize("bytes_left", [0, 4])
class TestReleasedMemory:
    """Reading it ended the process with SIGSEGV."""

    @pytest.fixture(autouse=True)
    def _not_shrunk_in_triton(self, bytes_left, backend):
        if backend == "triton" and bytes_left:
            pytest.skip("Triton is handed a pointer and sees only that there is none")

    @pytest.mark.parametrize("which", ["input", "target"])
    def test_of_logits_and_labels(self, which, bytes_left, backend):
        given = {"input": Z, "target": Y}
        given[which] = released(given[which], bytes_left)
        with pytest.raises(RuntimeError, match=r"memory .* released"):
            lmf_loss(**given, backend=backend)

    @pytest.mark.parametrize("which", ["margins", "weight", "ldam_weight", "focal_weight"])
    def test_of_tables(self, which, bytes_left, backend):
        with pytest.raises(RuntimeError, match=r"memory .* released"):
            lmf_loss(Z, Y, **{which: released(torch.rand(4), bytes_left)}, backend=backend)

    @pytest.mark.parametrize("which", ["logits", "target", "grad_output"])
    def test_before_backward(self, which, bytes_left, backend):
        if backend == "reference":
            pytest.skip("autograd's own formulas read what they saved")
        leaf = torch.randn(5, 4, requires_grad=True)
        tensors = {"logits": leaf * 1, "target": Y.clone(), "grad_output": torch.ones(5)}
        loss = lmf_loss(tensors["logits"], tensors["target"], reduction="none", backend=backend)
        tensors[which].untyped_storage().resize_(bytes_left)
        with pytest.raises(RuntimeError, match=r"memory .* released"):
            torch.autograd.grad(loss, leaf, tensors["grad_output"])

    def test_of_a_modules_weights(self, bytes_left, backend):
        with pytest.raises(RuntimeError, match=r"weight .* released"):
            FocalLoss(weight=released(torch.rand(4), bytes_left))
        with pytest.raises(RuntimeError, match=r"weight .* released"):
            LMFLoss([1, 2, 3, 4]).set_weight(released(torch.rand(4), bytes_left))
        with pytest.raises(RuntimeError, match=r"labels .* released"):
            class_counts(released(Y, bytes_left), 4)


@native_only
@pytest.mark.parametrize("classes", [5, 200])
@pytest.mark.parametrize("label", [-1, 1000, 2**40, -(2**63)])
def test_labels_changed_before_backward_write_nowhere(label, classes):
    """Such a label was an address to write to; the version counter does not see every change."""
    z, y = torch.randn(3, classes), torch.tensor([0, 1, 2])
    arguments = (z, y, None, None, None, None, None, 1.0, 1.0, 1.5, 30.0, -100, 1)
    op = _ops.OPS["native"]
    for forward, backward in ((op.forward, op.backward), (_C.native_forward, _C.native_backward)):
        _, saved, denominators = forward(*arguments)
        right = backward(torch.tensor(1.0), z, y, saved, denominators, *arguments[7:])
        grad = backward(
            torch.tensor(1.0), z, y.index_fill(0, torch.tensor(1), label), saved, denominators, *arguments[7:]
        )
        assert torch.equal(grad[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("make, kind", [
    (torch.Tensor.to_sparse, "sparse_coo"),
    (lambda t: torch.nested.nested_tensor([t, t]), "nested"),
    (lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged), "nested"),
])  # fmt: skip
def test_tensors_without_strides(make, kind, backend):
    for name in ("input", "target", "margins", "weight", "ldam_weight", "focal_weight"):
        value = make({"input": Z, "target": Y}.get(name, torch.rand(4)))
        with pytest.raises(TypeError, match=rf"{name} .*dense.*{kind}"):
            lmf_loss(**{"input": Z, "target": Y, "backend": backend, name: value})
    with pytest.raises(TypeError, match=f"weight .*dense.*{kind}"):
        FocalLoss(weight=make(torch.rand(4)))
    with pytest.raises(TypeError, match=f"weight .*dense.*{kind}"):
        LMFLoss([1, 2, 3, 4]).set_weight(make(torch.rand(4)))


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "s", "normalizer", "ignore_index"])
def test_integers_beyond_the_machines(name, backend):
    with pytest.raises(ValueError, match=name):
        lmf_loss(Z, Y, **{name: 10**400}, backend=backend)
    with pytest.raises(ValueError, match=name):
        lmf_loss(Z, Y, **{name: -(10**400)}, backend=backend)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_ignore_index_beyond_int64(value, backend):
    with pytest.raises(ValueError, match=f"ignore_index .*{value}"):
        lmf_loss(Z, Y, ignore_index=value, backend=backend)


def test_backend_of_a_type_that_compares_elementwise():
    with pytest.raises(ValueError, match="backend"):
        lmf_loss(Z, Y, backend=np.array(["auto", "native"]))


def test_numbers_of_other_types(backend):
    check(Z, Y, backend, gamma=Fraction(3, 2), alpha=np.float32(0.5), s=np.int64(3), beta=True)


def test_complex_normalizer_is_refused(backend):
    """Its imaginary part was dropped."""
    with pytest.raises(TypeError, match=r"normalizer .*complex"):
        lmf_loss(Z, Y, normalizer=torch.tensor(1 + 1j), backend=backend)


def test_weights_that_set_weight_cannot_copy():
    criterion = LMFLoss([1, 2, 3, 4])
    with pytest.raises(RuntimeError, match=r"weight .*meta"):
        criterion.set_weight(torch.rand(4, device="meta"))
    for weight in (torch.rand(4) + 1j, torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8)):
        with pytest.raises(TypeError, match=r"weight .*real"):
            criterion.set_weight(weight)
    assert torch.equal(criterion.focal_weight, torch.ones(4))


@pytest.mark.parametrize("weight, error", [
    (3.0, TypeError), ("balanced", TypeError), ([1.0, 2.0], TypeError), (torch.tensor(1.0), ValueError),
    (torch.ones(2, 2), ValueError), (torch.ones(0), ValueError),
])  # fmt: skip
def test_focal_weights_name_what_was_given(weight, error):
    with pytest.raises(error, match=r"weight must .*\(C,\)"):
        FocalLoss(weight=weight)


@pytest.mark.parametrize(
    "labels",
    [
        *(None, "ab", object(), [0, "x"], [[0], [1, 2]], [10**400]),
        *(torch.zeros(2).to_sparse(), torch.zeros(2, device="meta", dtype=torch.long)),
    ],
)
def test_labels_that_are_none(labels):
    with pytest.raises(TypeError, match="labels"):
        class_counts(labels, 3)


@pytest.mark.parametrize("num_classes, error", [
    (None, TypeError), ("3", TypeError), (2.5, TypeError), (0, ValueError), (2**31, ValueError), (10**400, ValueError),
])  # fmt: skip
def test_num_classes(num_classes, error):
    with pytest.raises(error, match="num_classes"):
        class_counts([0, 1], num_classes)


@pytest.mark.parametrize(
    "counts",
    [
        *(None, "ab", [1, None], [[1], [2, 3]], [10**400]),
        *(torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.tensor([1 + 1j, 2])),
    ],
)
def test_counts_that_are_none(counts):
    with pytest.raises(TypeError, match="cls_num_list"):
        ldam_margins(counts)


@pytest.mark.parametrize("value, error", [(None, TypeError), ("1", TypeError), (math.nan, ValueError),
                                          (10**400, ValueError), (-(10**400), ValueError)])  # fmt: skip
def test_numbers_of_the_helpers(value, error):
    with pytest.raises(error, match="max_m"):
        ldam_margins([1, 2], value)
    with pytest.raises(error, match="beta"):
        effective_number_weights([1, 2], value)
    torch.testing.assert_close(ldam_margins([1, 16], -(2**70)) / 2.0**70, -torch.tensor([1.0, 0.5]))


def test_lazily_negated_tensors_and_subclasses(backend):
    """What is not laid out as it says must not be read as if it were."""
    pair = torch.complex(Z, -Z)
    assert pair.conj().imag.is_neg()
    check(pair.conj().imag, Y, backend, margins=torch.complex(Z[0], Z[1]).conj().imag)
    right = lmf_loss(Z, Y, backend=backend)
    assert lmf_loss(Z.as_subclass(Subclass), Y, backend=backend) == right
    if backend == "native":
        assert lmf_loss(Wrapper(Z), Wrapper(Y), backend=backend) == right
