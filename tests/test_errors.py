"""Wrong calls: the type of the error, and a message that names the argument, what was given and what was expected."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import INTERPRETED

import lmf_kernels
from lmf_kernels import FocalLoss, LDAMLoss, LMFLoss, lmf_loss
from lmf_kernels._ops import no_triton

Z, Y, W = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), torch.rand(4)
NAN, INF = math.nan, math.inf


def refused(error, *words, input=Z, target=Y, **options):
    """The call raises `error`, and its message holds every one of the words."""
    with pytest.raises(error) as caught:
        lmf_loss(input, target, **options)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "s"])
@pytest.mark.parametrize("value", [-1.0, -1e-9, NAN, INF, -INF])
def test_number_out_of_range(name, value, backend):
    refused(ValueError, name, f"{value}", "finite", **{name: value}, backend=backend)


def test_scale_must_be_positive(backend):
    refused(ValueError, "s ", "> 0", "0", s=0.0, backend=backend)


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "s"])
@pytest.mark.parametrize("value", ["1", None, [1.0], 1j])
def test_number_of_another_type(name, value):
    refused(TypeError, name, type(value).__name__, **{name: value})


@pytest.mark.parametrize("value", ["avg", "", "Mean", "batchmean"])
def test_unknown_reduction(value, backend):
    refused(ValueError, "reduction", repr(value), "none", "mean", "sum", reduction=value, backend=backend)


@pytest.mark.parametrize("value", ["cuda", "", "Triton", "eager"])
def test_unknown_backend(value):
    refused(ValueError, "backend", repr(value), "auto", "triton", "native", "reference", backend=value)


@pytest.mark.parametrize("value", [None, 1, 2.0, ("mean",), ["sum"]])
@pytest.mark.parametrize("name", ["reduction", "backend"])
def test_option_of_another_type(name, value):
    refused((ValueError, TypeError), name, **{name: value})


@pytest.mark.parametrize("value", [1.0, "0", None])
def test_ignore_index_of_another_type(value):
    refused(TypeError, "ignore_index", type(value).__name__, ignore_index=value)


@pytest.mark.parametrize(
    "input_shape, target_shape",
    [
        ((5, 4), (4,)),
        ((5, 4), (5, 1)),
        ((5, 4), (1, 5)),
        ((5, 4), ()),
        ((5, 4), (5, 4)),
        ((4,), (1,)),
        ((4,), (4,)),
        ((5, 4, 3), (5,)),
        ((5, 4, 3), (5, 4)),
        ((5, 4, 3), (3, 5)),
        ((5, 4, 3), (5, 3, 1)),
        ((2, 4, 3, 3), (2, 9)),
        ((0, 4), (1,)),
        ((1, 4), (0,)),
    ],
)
def test_target_of_another_shape(input_shape, target_shape, backend):
    refused(
        ValueError, "target", str(tuple(target_shape)), str(input_shape),
        input=torch.randn(input_shape), target=torch.zeros(target_shape, dtype=torch.long), backend=backend,
    )  # fmt: skip


def test_input_without_classes(backend):
    zeros = {"dtype": torch.long}
    refused(ValueError, "input", "0-dim", input=torch.tensor(1.0), target=torch.tensor(0), backend=backend)
    for shape, labels in (((5, 0), (5,)), ((0,), ()), ((0, 0), (0,)), ((2, 0, 3), (2, 3))):
        refused(
            ValueError,
            "input",
            str(shape),
            input=torch.randn(shape),
            target=torch.zeros(labels, **zeros),
            backend=backend,
        )


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
)
def test_input_dtype(dtype, backend):
    refused(TypeError, "input", str(dtype), "float32", input=torch.zeros(5, 4).to(dtype), backend=backend)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.bool])
def test_target_dtype_suggests_long(dtype, backend):
    refused(TypeError, "target", str(dtype), ".long()", target=(Y % 2).to(dtype), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_class_probabilities_are_refused_in_words(dtype, backend):
    for target in (Y.to(dtype), torch.rand(5, 4).to(dtype)):
        refused(TypeError, "target", str(dtype), "class probabilities", target=target, backend=backend)


@pytest.mark.parametrize("value", [None, 3, [0.1, 0.2], "x"])
def test_not_a_tensor(value):
    refused(TypeError, "input", type(value).__name__, input=value)
    refused(TypeError, "target", type(value).__name__, target=value)


@pytest.mark.parametrize("name", ["margins", "weight", "ldam_weight", "focal_weight"])
class TestTables:
    @pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), (1, 4), (), (0,)])
    def test_shape(self, name, shape, backend):
        refused(ValueError, name, str(shape), "(4,)", **{name: torch.rand(shape)}, backend=backend)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_dtype(self, name, dtype, backend):
        refused(TypeError, name, str(dtype), **{name: torch.ones(4).to(dtype)}, backend=backend)

    @pytest.mark.parametrize("value", [[0.1, 0.2, 0.3, 0.4], 1.0, "balanced"])
    def test_type(self, name, value, backend):
        refused(TypeError, name, type(value).__name__, **{name: value}, backend=backend)

    def test_requires_grad(self, name, backend):
        refused(ValueError, name, "grad", **{name: torch.rand(4, requires_grad=True)}, backend=backend)

    def test_device(self, name, backend):
        refused(RuntimeError, name, "cpu", "meta", **{name: torch.rand(4, device="meta")}, backend=backend)


def test_target_on_another_device(backend):
    refused(RuntimeError, "target", "cpu", "meta", target=Y.to("meta"), backend=backend)


@pytest.mark.parametrize("name", ["ldam_weight", "focal_weight"])
def test_weight_together_with_one_of_its_parts(name, backend):
    refused(ValueError, "weight", name, weight=W, backend=backend, **{name: W})
    with pytest.raises(ValueError, match=name):
        LMFLoss([1, 2, 3, 4], weight=W, **{name: W})


@pytest.mark.parametrize(
    "value, error",
    [
        ((1.0,), ValueError),
        ((1.0, 2.0, 3.0), ValueError),
        (torch.ones(2), ValueError),
        (torch.ones(1, 1), ValueError),
        ((torch.ones(2), 1.0), ValueError),
        ("sum", TypeError),
        ((None, 1.0), TypeError),
        (NAN, ValueError),
    ],
)
def test_normalizer(value, error, backend):
    refused(error, "normalizer", normalizer=value, backend=backend)


def test_normalizer_on_another_device(backend):
    refused(RuntimeError, "normalizer", "meta", normalizer=torch.ones((), device="meta"), backend=backend)


def test_options_are_keyword_only():
    """F.cross_entropy's third argument is `weight`; here nothing may silently take its place."""
    with pytest.raises(TypeError, match="positional"):
        lmf_loss(Z, Y, W)
    for module in (LMFLoss, LDAMLoss):
        with pytest.raises(TypeError, match="positional"):
            module([1, 2], W)
    with pytest.raises(TypeError, match="positional"):
        FocalLoss(W)
    with pytest.raises(TypeError, match="label_smoothing"):
        lmf_loss(Z, Y, label_smoothing=0.1)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on CPU tensors")
@pytest.mark.skipif(no_triton is not None, reason="the package triton is not installed")
def test_triton_refuses_cpu_tensors_in_words():
    with pytest.raises(RuntimeError) as caught:
        lmf_loss(Z, Y, backend="triton")
    message = str(caught.value)
    assert "triton" in message.lower() and "cpu" in message.lower() and "TRITON_INTERPRET" in message


def test_error_of_one_call_leaves_the_next_alone(backend):
    refused(ValueError, "reduction", reduction="avg", backend=backend)
    assert lmf_loss(Z, Y, backend=backend).isfinite()


def in_fresh_python(code, **environment):
    """Run `code` in another process, where imports may be blocked."""
    root = Path(lmf_kernels.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_auto_on_cpu_is_native():
    code = """
import torch
from lmf_kernels import lmf_loss
z, y = torch.randn(50, 40), torch.randint(0, 40, (50,))
with torch.profiler.profile() as profile:
    lmf_loss(z, y)
assert any("native_forward" in event.name for event in profile.events()), [e.name for e in profile.events()]
"""
    run = in_fresh_python(code)
    assert run.returncode == 0, run.stderr
