"""Errors and warnings in the words of who made the mistake: what was given, and the call that mends it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lmf_kernels import FocalLoss, LDAMLoss, LinearLMFLoss, LMFLoss, linear_lmf_loss, lmf_loss

COUNTS = [500, 80, 9, 40]
MODULES = {
    "LMFLoss": lambda: LMFLoss(COUNTS),
    "LDAMLoss": lambda: LDAMLoss(COUNTS),
    "FocalLoss": lambda: FocalLoss(weight=torch.ones(4)),
}


def message(error, call, *args, **options):
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.fixture(params=list(MODULES))
def criterion(request):
    return MODULES[request.param]()


# ---- modules --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 5, 2, 2)])
def test_logits_of_another_number_of_classes(shape, criterion):
    name = type(criterion).__name__
    source = "weight" if name == "FocalLoss" else "cls_num_list"
    target = torch.zeros(shape[:1] * (len(shape) > 1) + shape[2:], dtype=torch.long)
    said = message(ValueError, criterion, torch.randn(shape), target)
    assert said == f"{name} was built for 4 classes (the length of {source}), input has 5: its shape is {shape}"


def test_classes_in_the_last_dimension(criterion):
    said = message(ValueError, criterion, torch.randn(2, 7, 4), torch.zeros(2, 7).long())
    assert "built for 4 classes" in said and "input.movedim(-1, 1)" in said


def test_module_on_another_device(criterion):
    name = type(criterion).__name__
    table = "focal_weight" if name == "FocalLoss" else "margins"
    z, y = torch.randn(5, 4, device="meta"), torch.zeros(5, dtype=torch.long, device="meta")
    said = message(RuntimeError, criterion, z, y)
    where = f"{name} (its {table}) is on cpu, input on meta"
    assert said == f"{where}: move the loss as you move the model, loss.to('meta')"
    said = message(RuntimeError, criterion.to("meta"), torch.randn(5, 4), torch.zeros(5).long())
    assert said.startswith(f"{name} (its {table}) is on meta, input on cpu") and "loss.reset_parameters()" in said


def test_one_table_on_another_device():
    loss = LMFLoss(COUNTS)
    loss.focal_weight = loss.focal_weight.to("meta")
    said = message(RuntimeError, loss, torch.randn(2, 4), torch.tensor([0, 1]))
    assert "LMFLoss (its focal_weight) is on meta, input on cpu" in said


def test_other_errors_pass_through(criterion):
    z, y = torch.randn(5, 4), torch.zeros(5).long()
    assert message(ValueError, criterion, z, y[:3]).startswith("target must have shape (5,)")
    assert message(RuntimeError, criterion, z, y.to("meta")).startswith("target must be on input's device cpu")
    assert message(ValueError, criterion, z, y, -1.0).startswith("normalizer")
    assert message(TypeError, criterion, z.long(), y).startswith("input must be")
    assert message(TypeError, criterion, "z", y).startswith("input must be")


def test_linear_head():
    head = LinearLMFLoss(6, COUNTS)
    x, y = torch.randn(5, 6), torch.zeros(5).long()
    said = message(ValueError, head, x[:, :4], y)
    assert said == "LinearLMFLoss was built for in_features=6, input of shape (5, 4) has 4"
    said = message(RuntimeError, head, x.to("meta"), y.to("meta"))
    assert said.startswith("LinearLMFLoss (its linear.weight) is on cpu, input on meta") and ".to('meta')" in said
    assert message(ValueError, head, x, y, -1.0).startswith("normalizer")
    assert message(TypeError, head, "x", y).startswith("input must be")


# ---- targets --------------------------------------------------------------------------------------------------------
def linear(z, y):
    """The linear loss of as many features as classes."""
    return linear_lmf_loss(z, torch.eye(z.shape[-1]), y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 3, 3), (2, 4, 3, 3, 2)])
def test_labels_with_a_channel(shape, dtype):
    z, y = torch.randn(shape), torch.zeros(shape[0], 1, *shape[2:], dtype=dtype)
    error = TypeError if dtype in (torch.float32, torch.int32) else ValueError
    for call in (lmf_loss, linear) if len(shape) == 2 else (lmf_loss,):
        said = message(error, call, z, y)
        assert said.startswith("target must") and said.endswith("squeeze the channel: target.squeeze(1).long()")
    assert lmf_loss(z, y.squeeze(1).long()).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("call", [lmf_loss, linear])
def test_floating_labels(call, dtype):
    said = message(TypeError, call, torch.randn(5, 4), torch.zeros(5, dtype=dtype))
    assert f"got {dtype}: convert class indices with target.long()" in said


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("call", [lmf_loss, linear])
def test_one_hot_labels(call, dtype):
    z, y = torch.randn(5, 4), torch.eye(4)[[0, 1, 2, 3, 0]].to(dtype)
    said = message(TypeError if dtype in (torch.int32, torch.bool) else ValueError, call, z, y)
    fix = "target.int().argmax(1)" if dtype == torch.bool else "target.argmax(1)"
    assert f"one-hot labels become class indices with {fix}" in said and "single-label" in said
    assert call(z, y.int().argmax(1)).isfinite()


def test_one_hot_label_of_one_sample():
    assert "target.argmax(0)" in message(ValueError, lmf_loss, torch.randn(4), torch.tensor([0, 1, 0, 0]))


@pytest.mark.parametrize("call", [lmf_loss, linear])
def test_multi_label_targets(call):
    y = torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 1]])
    said = message(TypeError, call, torch.randn(2, 4), y)
    assert "single-label" in said and "multi-label" in said and "nn.BCEWithLogitsLoss" in said


# ---- one logit ------------------------------------------------------------------------------------------------------
@pytest.fixture
def _not_warned(monkeypatch):
    monkeypatch.setattr("lmf_kernels._hints._warned_of_one_class", False)


CALLS = {
    "function": lambda: lmf_loss(torch.randn(5, 1), torch.zeros(5).long()),
    "module": lambda: LMFLoss([7])(torch.randn(5, 1), torch.zeros(5).long()),
    "linear": lambda: linear_lmf_loss(torch.randn(5, 3), torch.randn(1, 3), torch.zeros(5).long()),
}


@pytest.mark.parametrize("kind", list(CALLS))
@pytest.mark.usefixtures("_not_warned")
def test_one_logit_warns_once(kind):
    """Its loss is 0 whatever the logit: nothing is learned, without a word."""
    with pytest.warns(UserWarning, match=r"single class.*loss 0.*nn\.BCEWithLogitsLoss"):
        assert CALLS[kind]() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CALLS[kind]() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.filterwarnings("ignore:.*single class")
def test_binary_targets_of_one_logit(dtype):
    y = torch.zeros(5, 1, dtype=dtype)
    error = ValueError if dtype == torch.int64 else TypeError
    said = message(error, lmf_loss, torch.randn(5, 1), y)
    assert "one logit a sample is binary classification; use nn.BCEWithLogitsLoss" in said


@pytest.mark.usefixtures("_not_warned")
def test_one_logit_breaks_no_graph(backend):
    criterion = LMFLoss([7], backend=backend)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*single class")
        assert compiled(torch.randn(5, 1), torch.zeros(5).long()) == 0


@pytest.mark.parametrize("module", [nn.Identity(), None])
def test_mistakes_in_a_compiled_step_are_named_as_well(module):
    criterion = LMFLoss(COUNTS)
    step = torch.compile(lambda z, y: criterion(z if module is None else module(z), y), backend="eager")
    said = message(ValueError, step, torch.randn(3, 5), torch.zeros(3).long())
    assert "LMFLoss was built for 4 classes" in said
    assert step(torch.randn(3, 4), torch.zeros(3).long()).isfinite()
