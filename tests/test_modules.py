"""The modules: the function with margins from counts, weights that change in place, and what nn.Module promises."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from checks import assert_exact
from oracle import expected
from torch import nn

from lmf_kernels import DeferredReweighting, FocalLoss, LDAMLoss, LMFLoss, global_normalizer, ldam_margins, lmf_loss

COUNTS = [500, 80, 9, 40]


@pytest.fixture
def batch():
    z, y = torch.randn(11, 4), torch.randint(0, 4, (11,))
    y[4] = -100
    return z, y, torch.rand(4) + 0.2


def test_lmf(batch, backend):
    z, y, w = batch
    options = dict(alpha=1.5, beta=0.7, gamma=2.0, s=10.0, reduction="sum", backend=backend)
    loss = LMFLoss(COUNTS, max_m=0.8, ldam_weight=w, focal_weight=w.flip(0), **options)(z, y)
    del options["backend"]
    want, _ = expected(z, y, margins=ldam_margins(COUNTS, 0.8), ldam_weight=w, focal_weight=w.flip(0), **options)
    assert_exact(loss, want)


def test_ldam(batch, backend):
    z, y, w = batch
    loss = LDAMLoss(COUNTS, max_m=0.3, s=10.0, weight=w, ignore_index=2, backend=backend)(z, y.clamp(min=0))
    want, _ = expected(z, y.clamp(min=0), margins=ldam_margins(COUNTS, 0.3), s=10.0, beta=0.0, weight=w, ignore_index=2)
    assert_exact(loss, want)


def test_focal(batch, backend):
    z, y, w = batch
    loss = FocalLoss(gamma=2.0, weight=w, reduction="none", backend=backend)(z, y)
    assert_exact(loss, expected(z, y, alpha=0.0, gamma=2.0, weight=w, reduction="none")[0])


def test_defaults_are_the_papers(batch):
    z, y, _ = batch
    margins = ldam_margins(COUNTS, 0.5)
    assert_exact(LMFLoss(COUNTS)(z, y), expected(z, y, margins=margins, alpha=1.0, beta=1.0, gamma=1.5, s=30.0)[0])
    assert_exact(LDAMLoss(COUNTS)(z, y), expected(z, y, margins=margins, beta=0.0, s=30.0)[0])
    assert_exact(FocalLoss()(z, y), expected(z, y, alpha=0.0, gamma=1.5)[0])


@pytest.mark.parametrize("function", [lmf_loss, LMFLoss, LDAMLoss, FocalLoss])
def test_signature_is_the_contracts(function):
    options = {
        "margins": None, "alpha": 1.0, "beta": 1.0, "gamma": 1.5, "max_m": 0.5, "s": 30.0, "weight": None,
        "ldam_weight": None, "focal_weight": None, "ignore_index": -100, "reduction": "mean", "normalizer": None,
        "backend": "auto", "class_group": None, "min_count": None,
    }  # fmt: skip
    without = {
        lmf_loss: {"max_m", "min_count"},
        LMFLoss: {"margins", "normalizer"},
        LDAMLoss: {"margins", "normalizer", "alpha", "beta", "gamma", "ldam_weight", "focal_weight"},
        FocalLoss: {"margins", "normalizer", "alpha", "beta", "max_m", "s", "ldam_weight", "focal_weight", "min_count"},
    }[function]
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == {name: value for name, value in options.items() if name not in without}
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == {lmf_loss: ["input", "target"], FocalLoss: []}.get(function, ["cls_num_list"])


@pytest.mark.parametrize("kind", [LMFLoss, LDAMLoss])
@pytest.mark.parametrize("given", [False, True])
def test_set_weight_works_in_place(kind, given, batch, backend):
    z, y, w = batch
    criterion = kind(COUNTS, backend=backend, weight=torch.ones(4) if given else None)
    buffers = dict(criterion.named_buffers())
    places = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    before = w.clone()
    criterion.set_weight(w)
    assert torch.equal(criterion(z, y), kind(COUNTS, weight=w, backend=backend)(z, y))
    assert {name: buffer.data_ptr() for name, buffer in criterion.named_buffers()} == places
    w.mul_(2)  # the module holds copies
    assert torch.equal(criterion(z, y), kind(COUNTS, weight=before, backend=backend)(z, y))


def test_set_weight_of_focal(batch, backend):
    z, y, w = batch
    criterion = FocalLoss(weight=torch.ones(4), backend=backend)
    criterion.set_weight(w)
    assert torch.equal(criterion(z, y), FocalLoss(weight=w, backend=backend)(z, y))


@pytest.mark.parametrize(
    "weight, error", [(torch.rand(3), ValueError), (torch.rand(4, 1), ValueError), ([1.0] * 4, TypeError)]
)
def test_set_weight_refuses(weight, error):
    with pytest.raises(error, match="weight"):
        LMFLoss(COUNTS).set_weight(weight)


def test_set_weight_between_forward_and_backward_leaves_the_gradient_alone(batch, backend):
    z, y, w = batch
    z.requires_grad_()
    criterion = LMFLoss(COUNTS, weight=w, backend=backend)
    loss = criterion(z, y)
    criterion.set_weight(100 * torch.ones(4))
    assert_exact(torch.autograd.grad(loss, z)[0], expected(z, y, margins=ldam_margins(COUNTS), weight=w)[1])


def test_buffers_are_distinct_tensors():
    w = torch.rand(4)
    criterion = LMFLoss(COUNTS, weight=w)
    places = {tensor.data_ptr() for tensor in (w, criterion.margins, criterion.ldam_weight, criterion.focal_weight)}
    assert len(places) == 4
    assert not list(criterion.parameters())


def test_normalizer_is_an_argument_of_the_call(batch, backend):
    z, y, w = batch
    for criterion, options in (
        (LMFLoss(COUNTS, weight=w, backend=backend), dict(margins=ldam_margins(COUNTS), weight=w)),
        (LDAMLoss(COUNTS, weight=w, backend=backend), dict(margins=ldam_margins(COUNTS), weight=w, beta=0.0)),
        (FocalLoss(weight=w, backend=backend), dict(weight=w, alpha=0.0)),
    ):
        want, _ = expected(z, y, normalizer=7.0, **options)
        assert_exact(criterion(z, y, 7.0), want)
        assert_exact(criterion(z, y, normalizer=torch.tensor(7.0)), want)


def make():
    return [LMFLoss(COUNTS, weight=torch.rand(4) + 0.2), LDAMLoss(COUNTS), FocalLoss(weight=torch.rand(4) + 0.2)]


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu"), lambda m: m.double()],
)
def test_copies_compute_the_same(index, how, batch):
    z, y, _ = batch
    criterion = make()[index]
    want = criterion(z, y)
    torch.testing.assert_close(how(criterion)(z, y), want)


@pytest.mark.parametrize("index", range(3))
def test_half_module_reads_its_rounded_buffers(index, batch):
    z, y, _ = batch
    criterion = make()[index].half()
    assert criterion(z, y).dtype == torch.float32
    assert criterion(z.half(), y).dtype == torch.float32
    assert criterion(z.double(), y).dtype == torch.float64


@pytest.mark.parametrize("index", range(3))
def test_state_dict_carries_the_buffers(index, batch):
    z, y, _ = batch
    one, other = make()[index], make()[index]
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(z, y), other(z, y))


@pytest.mark.parametrize("index", range(3))
def test_repr_names_the_options(index):
    text = repr(make()[index])
    assert type(make()[index]).__name__ in text and "reduction" in text


@pytest.mark.parametrize("kind", [LMFLoss, LDAMLoss])
def test_bad_options_are_refused_when_built(kind):
    with pytest.raises(ValueError, match=r"class 1"):
        kind([5, 0, 3])
    for options, word in (
        (dict(s=-1.0), "s"),
        (dict(reduction="avg"), "reduction"),
        (dict(backend="cuda"), "backend"),
        (dict(weight=torch.rand(3)), "weight"),
        (dict(weight=torch.rand(4, requires_grad=True)), "grad"),
        (dict(max_m=float("nan")), "max_m"),
    ):
        with pytest.raises(ValueError, match=word):
            kind(COUNTS, **options)


@pytest.mark.parametrize("options", [dict(alpha=-1.0), dict(beta=float("inf")), dict(gamma=float("nan"))])
def test_bad_numbers_are_refused_when_built(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LMFLoss(COUNTS, **options)


@pytest.mark.parametrize("kind", [LMFLoss, LDAMLoss])
def test_logits_of_another_class_count_are_refused(kind):
    words = rf"^{kind.__name__} was built for 4 classes \(the length of cls_num_list\), input has 5"
    with pytest.raises(ValueError, match=words):
        kind(COUNTS)(torch.randn(3, 5), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), LMFLoss(COUNTS), LDAMLoss(COUNTS), FocalLoss()])
def test_swapping_the_criterion_trains_with_no_other_change(criterion):
    x, y = torch.randn(120, 8), torch.arange(120) % 4
    x[torch.arange(120), y] += 3.0
    model = nn.Linear(8, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize(
    "function", [lmf_loss, LMFLoss, LDAMLoss, FocalLoss, ldam_margins, global_normalizer, DeferredReweighting]
)
def test_help_reads_well(function):
    text = inspect.getdoc(function)
    assert text and all(word in text for word in ("Args:", "Raises:", "arXiv"))
