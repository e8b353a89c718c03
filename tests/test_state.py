"""What a checkpoint holds of the losses, and losses that are built before there is memory for them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from checks import INTERPRETED
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from lmf_kernels import DeferredReweighting, FocalLoss, LDAMLoss, LinearLMFLoss, LMFLoss, ldam_margins
from lmf_kernels._state import ClassBuffers

COUNTS = [500, 80, 9, 40]
OTHER = [7, 300, 41, 22]
WEIGHT = torch.tensor([0.5, 1.0, 3.0, 2.0])


class Model(nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.criterion = criterion

    def forward(self, x):
        return self.linear(x)


def batch():
    return torch.randn(11, 4), torch.arange(11) % 4


PLAIN = {
    "lmf": lambda counts=COUNTS: LMFLoss(counts),
    "ldam": lambda counts=COUNTS: LDAMLoss(counts),
    "focal": lambda counts=COUNTS: FocalLoss(),
    "cross-entropy": lambda counts=COUNTS: nn.CrossEntropyLoss(),
}
WEIGHTED = {
    "lmf": lambda w=WEIGHT, counts=COUNTS: LMFLoss(counts, weight=w),
    "terms": lambda w=WEIGHT, counts=COUNTS: LMFLoss(counts, ldam_weight=w, focal_weight=w.flip(0)),
    "ldam": lambda w=WEIGHT, counts=COUNTS: LDAMLoss(counts, weight=w),
    "focal": lambda w=WEIGHT, counts=COUNTS: FocalLoss(weight=w),
}


@pytest.mark.parametrize("source", list(PLAIN))
@pytest.mark.parametrize("target", list(PLAIN))
def test_without_weights_every_criterion_s_checkpoint_fits_every_other(source, target):
    saved = Model(PLAIN[source]()).state_dict()
    assert set(saved) == {"linear.weight", "linear.bias"}
    model = Model(PLAIN[target](OTHER))
    z, y = batch()
    want = model.criterion(z, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(saved, strict=True)
    assert torch.equal(model.criterion(z, y), want)


@pytest.mark.parametrize("kind", list(WEIGHTED))
@pytest.mark.parametrize("assign", [False, True])
def test_given_weights_travel_and_margins_do_not(kind, assign):
    model, other = Model(WEIGHTED[kind]()), Model(WEIGHTED[kind](torch.ones(4), OTHER))
    saved = copy.deepcopy(model.state_dict())
    assert not any("margins" in name for name in saved) and any("weight" in name.split(".")[-1] for name in saved)
    other.load_state_dict(saved, assign=assign)
    for name in ("ldam_weight", "focal_weight"):
        given, loaded = getattr(model.criterion, name), getattr(other.criterion, name)
        assert (given is None and loaded is None) or torch.equal(given, loaded)
    if other.criterion.margins is not None:
        assert torch.equal(other.criterion.margins, ldam_margins(OTHER))
    with pytest.raises(RuntimeError, match=r"Missing key.*criterion\.\w+_weight"):  # as nn.CrossEntropyLoss(weight)
        other.load_state_dict(Model(nn.CrossEntropyLoss()).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*criterion\.\w+_weight"):
        Model(nn.CrossEntropyLoss()).load_state_dict(saved)


@pytest.mark.parametrize("kind", list(WEIGHTED))
def test_weights_of_a_cross_entropy_checkpoint(kind):
    saved = Model(nn.CrossEntropyLoss(weight=WEIGHT)).state_dict()
    model = Model(WEIGHTED[kind](torch.ones(4)))
    model.load_state_dict(saved)
    for weight in (model.criterion.ldam_weight, model.criterion.focal_weight):
        assert weight is None or torch.equal(weight, WEIGHT)
    for criterion in (nn.CrossEntropyLoss(), LMFLoss(COUNTS), FocalLoss()):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*criterion\.weight"):
            Model(criterion).load_state_dict(saved)


def test_weights_that_a_schedule_has_set_travel():
    model = Model(LDAMLoss(COUNTS))
    DeferredReweighting(model.criterion, COUNTS, epoch=2)(5)
    saved = copy.deepcopy(model.state_dict())
    assert "criterion.ldam_weight" in saved
    fresh = Model(LDAMLoss(COUNTS))
    for load in (fresh.load_state_dict, lambda state: set_model_state_dict(fresh, state)):
        fresh.criterion.reset_parameters()
        load(copy.deepcopy(saved))
        assert torch.equal(fresh.criterion.ldam_weight, model.criterion.ldam_weight)
        assert set(fresh.state_dict()) == set(saved)
    # One without weights leaves the schedule's alone, which sets them again at the next epoch.
    fresh.load_state_dict(Model(nn.CrossEntropyLoss()).state_dict())
    assert torch.equal(fresh.criterion.ldam_weight, model.criterion.ldam_weight)
    assert set(fresh.state_dict()) == set(saved)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("given", [None, WEIGHT])
def test_checkpoints_of_the_first_version(strict, given):
    """They hold the margins, and ones where there were no weights."""
    old = Model(nn.Identity()).state_dict()
    old["criterion.margins"] = ldam_margins(OTHER)
    for name in ("ldam_weight", "focal_weight"):
        old[f"criterion.{name}"] = torch.ones(4) if given is None else given.clone()
    before = dict(old)
    model = Model(LMFLoss(COUNTS, weight=None if given is None else torch.ones(4)))
    with pytest.warns(UserWarning, match=r"LMFLoss: criterion.margins of this checkpoint are not loaded.*cls_num_list"):
        assert str(model.load_state_dict(old, strict=strict)) == "<All keys matched successfully>"
    assert torch.equal(model.criterion.margins, ldam_margins(COUNTS)) and old.keys() == before.keys()
    assert torch.equal(model.criterion.focal_weight, torch.ones(4) if given is None else given)
    assert ("criterion.ldam_weight" in model.state_dict()) == (given is not None)


def test_a_checkpoint_of_another_number_of_classes_is_refused():
    model = Model(LMFLoss([3, 2], weight=torch.ones(2)))
    model.linear = nn.Linear(6, 2)
    with pytest.raises(RuntimeError, match=r"size mismatch for criterion\.ldam_weight"):
        model.load_state_dict({**model.state_dict(), "criterion.ldam_weight": WEIGHT})


def test_a_linear_head_loads_into_one_by_name():
    head = LinearLMFLoss(6, COUNTS)
    assert set(head.state_dict()) == {"linear.weight", "linear.bias"}
    head.load_state_dict(Model(nn.Identity()).state_dict())


@pytest.mark.parametrize("kind", list(WEIGHTED))
@pytest.mark.parametrize(
    "how",
    [
        copy.deepcopy,
        lambda criterion: pickle.loads(pickle.dumps(criterion)),
        lambda criterion: torch.load(io.BytesIO(saved(criterion)), weights_only=False),
    ],
)
def test_copies_keep_what_is_state(kind, how):
    for make in (WEIGHTED[kind], PLAIN.get(kind, PLAIN["lmf"])):
        criterion = make()
        twin = how(criterion)
        assert twin.state_dict().keys() == criterion.state_dict().keys()
        if criterion.ldam_weight is not None:
            twin.set_weight(WEIGHT.flip(0))
            assert "ldam_weight" in twin.state_dict()
            assert criterion.state_dict().keys() == make().state_dict().keys()


def saved(criterion):
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    return buffer.getvalue()


def test_distributed_checkpoints():
    model = Model(LMFLoss(COUNTS))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert set(state) == {"linear.weight", "linear.bias"}
    set_model_state_dict(Model(nn.CrossEntropyLoss()), state)
    set_model_state_dict(Model(LDAMLoss(OTHER)), state)
    weighted = Model(LMFLoss(COUNTS, weight=WEIGHT))
    other = Model(LMFLoss(OTHER, weight=torch.ones(4)))
    set_model_state_dict(other, get_model_state_dict(weighted))
    assert torch.equal(other.criterion.focal_weight, WEIGHT)


# ---- built without memory -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["lmf", "ldam"])
def test_built_under_the_meta_device(kind):
    """Margins and ones are known and stay real; a given tensor keeps its device."""
    with torch.device("meta"):
        model = Model(PLAIN[kind]())
        weighted = WEIGHTED[kind]()
    assert model.linear.weight.is_meta
    model.load_state_dict(Model(nn.CrossEntropyLoss()).state_dict(), assign=True)
    z, y = batch()
    assert torch.equal(model.criterion(model(torch.ones(11, 6)), y), PLAIN[kind]()(model(torch.ones(11, 6)), y))
    assert torch.equal(weighted(z, y), WEIGHTED[kind]()(z, y))


@pytest.mark.parametrize("kind", list(WEIGHTED))
def test_reset_parameters_after_to_empty(kind):
    z, y = batch()
    for make in (WEIGHTED[kind], PLAIN.get(kind, PLAIN["lmf"])):
        want = make()(z, y)
        model = Model(make()).to("meta").to_empty(device="cpu")
        for buffer in model.criterion.buffers():
            buffer.fill_(float("nan"))  # as undefined memory may be
        model.criterion.reset_parameters()
        assert torch.equal(model.criterion(z, y), want)
        assert model.criterion.state_dict().keys() == make().state_dict().keys()


def test_reset_parameters_undoes_a_schedule():
    criterion = LMFLoss(COUNTS).half()
    criterion.set_weight(WEIGHT)
    criterion.reset_parameters()
    assert (criterion.ldam_weight == 1).all() and not criterion.state_dict()
    assert torch.equal(criterion.margins, ldam_margins(COUNTS).half())


def test_weights_that_never_had_values_become_nan():
    """Rather than whatever lies in memory."""
    with torch.device("meta"):
        criterion = LMFLoss(COUNTS, weight=torch.ones(4))
    assert criterion.ldam_weight.is_meta
    criterion.to_empty(device="cpu").reset_parameters()
    assert criterion.ldam_weight.isnan().all() and torch.equal(criterion.margins, ldam_margins(COUNTS))


def test_a_head_built_under_the_meta_device():
    with torch.device("meta"):
        head = LinearLMFLoss(6, COUNTS)
    assert head.linear.weight.is_meta and not head.margins.is_meta
    head.load_state_dict(LinearLMFLoss(6, OTHER).state_dict(), assign=True)
    assert torch.equal(head.margins, ldam_margins(COUNTS))
    assert head(torch.ones(4, 6), torch.arange(4)).isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_built_under_the_cuda_device():
    with torch.device("cuda"):
        model = Model(LMFLoss(COUNTS))
        loss = model.criterion(model(torch.ones(4, 6)), torch.arange(4))
    assert {buffer.device.type for buffer in model.buffers()} == {"cuda"} and loss.isfinite()


def test_tables_are_made_on_the_default_device():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        tables = ClassBuffers(torch.rand(4, device="cpu"), {"ldam_weight": None})
    assert tables.margins.device.type == tables.ldam_weight.device.type == "cuda"
    assert tables._built["margins"].device.type == "cpu"


@pytest.mark.skipif(INTERPRETED, reason="about transformers, in the process of the other tests")
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_from_pretrained_of_transformers(weight, tmp_path):
    """It builds under torch.device("meta") and replaces every buffer that is in no checkpoint by undefined memory."""
    transformers = pytest.importorskip("transformers")

    class Pretrained(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.linear = nn.Linear(6, 4)
            self.criterion = CRITERION()
            self.post_init()

    CRITERION = nn.CrossEntropyLoss
    Pretrained(transformers.PretrainedConfig()).save_pretrained(tmp_path)
    for kind in (LMFLoss, LDAMLoss):
        CRITERION = lambda kind=kind: kind(COUNTS, weight=weight)  # noqa: E731
        torch.empty(4096).fill_(7.0)  # something for empty memory to hold
        model = Pretrained.from_pretrained(tmp_path)
        z, y = batch()
        assert torch.equal(model.criterion(z, y), CRITERION()(z, y))
        if weight is not None:
            model.criterion.ldam_weight.mul_(2)
            model.save_pretrained(tmp_path / kind.__name__)
            loaded = Pretrained.from_pretrained(tmp_path / kind.__name__)
            assert torch.equal(loaded.criterion.ldam_weight, 2 * WEIGHT)


# ---- torch.jit ------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", list(PLAIN))
def test_a_model_that_holds_the_loss_is_scripted_without_it(kind):
    model, x = Model(PLAIN[kind]()), torch.randn(3, 6)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), model(x))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


class Step(Model):
    def forward(self, x, y):
        return self.criterion(self.linear(x), y)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_step_that_calls_the_loss_is_not_scripted():
    with pytest.raises((AssertionError, OSError, RuntimeError), match="Sequence"):  # the type of `normalizer`
        torch.jit.script(Step(LMFLoss(COUNTS)))
