"""The README's recipes for moving over from published codes, against independent formulas of what those compute."""

import torch
import torch.nn.functional as F

from lmf_kernels import FocalLoss, LDAMLoss, LMFLoss, effective_number_weights, ldam_margins

COUNTS = [500, 83, 82, 39, 25, 11, 9]


def batch(ignored=None):
    logits = torch.randn(40, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 7, (40,))
    if ignored is not None:
        target[::5] = ignored
    return logits, target


def assert_same(loss, expected, logits):
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, logits)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-9)


def shifted(logits, target, margins, s):
    return s * (logits - F.one_hot(target, 7) * margins)


def test_official_lmf_code():
    """One vector serves as margins, as LDAM weights and as focal weights; alpha 1.5 weighs LDAM."""
    logits, target = batch()
    margins = ldam_margins(COUNTS).double()
    p_y = logits.softmax(1)[torch.arange(40), target]
    ldam = F.cross_entropy(shifted(logits, target, margins, 30), target, weight=margins)
    focal = (margins[target] * (1 - p_y) ** 1.5 * -p_y.log()).mean()
    criterion = LMFLoss(COUNTS, alpha=1.5, beta=1.0, gamma=1.5, s=30.0, weight=ldam_margins(COUNTS))
    assert_same(criterion(logits, target), 1.5 * ldam + focal, logits)


def test_ldam_drw():
    """No weights at first; from the deferred epoch on effective-number weights, set in place."""
    logits, target = batch()
    margins = ldam_margins(COUNTS).double()
    criterion = LDAMLoss(COUNTS)
    assert_same(criterion(logits, target), F.cross_entropy(shifted(logits, target, margins, 30), target), logits)
    beta, counts = 0.9999, torch.tensor(COUNTS, dtype=torch.float64)
    weight = (1 - beta) / (1 - beta**counts)
    weight = weight / weight.sum() * 7
    criterion.set_weight(effective_number_weights(COUNTS))
    expected = F.cross_entropy(shifted(logits, target, margins, 30), target, weight=weight)
    assert_same(criterion(logits, target), expected, logits)


def test_adeelh_focal_loss():
    """Unweighted p_t, class weights on the loss, mean over the rows that are not ignored."""
    logits, target = batch(ignored=-100)
    weight = torch.rand(7) + 0.5
    kept = target != -100
    log_p = logits[kept].log_softmax(1)
    log_p_t = log_p[torch.arange(int(kept.sum())), target[kept]]
    nll = F.nll_loss(log_p, target[kept], weight=weight.double(), reduction="none")
    expected = ((1 - log_p_t.exp()) ** 2 * nll).mean()
    assert_same(FocalLoss(gamma=2.0, weight=weight)(logits, target), expected, logits)


def widely_copied_variant(logits, target, alpha, beta):
    """alpha * focal of the batch mean, (1 - e^-L)^2 L with L the mean cross-entropy, + beta * LDAM."""
    nll = F.cross_entropy(logits, target)
    focal = (1 - torch.exp(-nll)) ** 2 * nll
    margins = ldam_margins(COUNTS).double()
    return alpha * focal + beta * F.cross_entropy(shifted(logits, target, margins, 30), target)


def test_widely_copied_variant():
    """Its alpha is our beta. Of one sample the losses are equal, of a batch not: its focal loss is not per sample."""
    recipe = LMFLoss(COUNTS, alpha=0.7, beta=1.3, gamma=2.0)  # theirs: alpha 1.3 (focal), beta 0.7 (LDAM)
    logits, target = batch()
    one = logits.detach()[:1].requires_grad_()
    assert_same(recipe(one, target[:1]), widely_copied_variant(one, target[:1], 1.3, 0.7), one)
    theirs, ours = (f(logits, target).item() for f in (lambda z, y: widely_copied_variant(z, y, 1.3, 0.7), recipe))
    assert abs(theirs - ours) > 1e-3 * ours
