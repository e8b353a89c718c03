"""Deferred re-weighting, with the numbers of LDAM-DRW; that it does not recompile is in test_compile.py."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmf_kernels import DeferredReweighting, FocalLoss, LDAMLoss, LMFLoss

COUNTS = [500, 83, 82, 39, 25, 11, 9]


def ldam_drw(logits, target, epoch):
    """What LDAM-DRW computes at an epoch: numpy weights, one-hot margins, weighted cross-entropy of 30 (x - m)."""
    beta = [0, 0.9999][epoch // 160]
    weights = (1.0 - beta) / (1.0 - np.power(beta, COUNTS))
    weights = torch.tensor(weights / np.sum(weights) * len(COUNTS))
    margins = 1.0 / np.sqrt(np.sqrt(COUNTS))
    margins = torch.tensor(margins * (0.5 / np.max(margins)))
    shifted = torch.where(F.one_hot(target, len(COUNTS)).bool(), logits - margins[target][:, None], logits)
    return F.cross_entropy(30 * shifted, target, weight=weights)


def test_numbers_of_ldam_drw(backend):
    criterion = LDAMLoss(COUNTS, backend=backend)
    schedule = DeferredReweighting(criterion, COUNTS)
    logits = F.normalize(torch.randn(40, 7, dtype=torch.float64)).requires_grad_()
    target = torch.arange(40) % 7
    seen = []
    for epoch in (0, 1, 159, 160, 161, 199):
        schedule(epoch)
        loss, want = criterion(logits, target), ldam_drw(logits, target, epoch)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        grads = (torch.autograd.grad(value, logits)[0] for value in (loss, want))
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-9)
        seen.append(loss.item())
    assert seen[0] == seen[2] != seen[3] == seen[5]


def test_in_place_and_for_every_loss():
    for criterion in (LMFLoss(COUNTS), LDAMLoss(COUNTS), FocalLoss(weight=torch.ones(7))):
        places = {name: buffer.data_ptr() for name, buffer in criterion.named_buffers()}
        schedule = DeferredReweighting(criterion, COUNTS, epoch=3, beta=0.99)
        schedule(3)
        weights = [criterion.focal_weight, criterion.ldam_weight]
        terms = 1.0 / (1.0 - 0.99 ** torch.tensor(COUNTS, dtype=torch.float64))
        for weight in weights:
            if weight is not None:
                torch.testing.assert_close(weight.double(), 7 * terms / terms.sum(), rtol=1e-6, atol=0)
        schedule(2)
        assert all((weight == 1).all() for weight in weights if weight is not None)
        assert {name: buffer.data_ptr() for name, buffer in criterion.named_buffers()} == places


def test_a_resumed_run_goes_on_with_the_same_weights():
    criterion = LDAMLoss(COUNTS)
    schedule = DeferredReweighting(criterion, COUNTS, epoch=2)
    schedule(5)
    resumed = LDAMLoss(COUNTS)
    DeferredReweighting(resumed, COUNTS, epoch=2)(5)
    assert torch.equal(resumed.ldam_weight, criterion.ldam_weight)
    loaded = LDAMLoss(COUNTS)
    loaded.load_state_dict(copy.deepcopy(criterion.state_dict()))
    assert torch.equal(loaded.ldam_weight, criterion.ldam_weight)


@pytest.mark.parametrize(
    "loss, options, error, words",
    [
        (torch.nn.CrossEntropyLoss(), {}, TypeError, "CrossEntropyLoss"),
        (FocalLoss(), {}, ValueError, "weight=torch.ones"),
        (LDAMLoss([5, 6]), {}, ValueError, "2 counts.*got 7"),
        (LDAMLoss(COUNTS), dict(epoch=-1), ValueError, "epoch.*-1"),
        (LDAMLoss(COUNTS), dict(epoch=1.5), TypeError, "epoch.*float"),
        (LDAMLoss(COUNTS), dict(beta=1.0), ValueError, "beta"),
    ],
)
def test_errors(loss, options, error, words):
    with pytest.raises(error, match=words):
        DeferredReweighting(loss, COUNTS, **options)


@pytest.mark.parametrize("epoch, error", [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_errors_of_a_call(epoch, error):
    with pytest.raises(error, match="epoch"):
        DeferredReweighting(LDAMLoss(COUNTS), COUNTS)(epoch)
