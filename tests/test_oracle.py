"""The test tools themselves: the oracle's two ways agree, the bar rejects, the pairs are complete."""

from __future__ import annotations

from itertools import combinations, product

import oracle
import pytest
import torch
import torch.nn.functional as F
from checks import assert_exact
from pairwise import pairwise


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("s", [1.0, 30.0, 64.0])
def test_composite_and_closed_form_agree_on_moderate_rows(gamma, s):
    rows, labels = torch.randn(40, 5, dtype=torch.float64) * 3, torch.randint(0, 5, (40,))
    margins = torch.rand(5, dtype=torch.float64) - 0.3
    moderate = oracle._composite_is_accurate(rows, labels, margins, s)
    assert moderate.sum() > 20
    terms = oracle.composite(rows[moderate], labels[moderate], margins, gamma, s)
    for k, i in enumerate(moderate.nonzero().flatten().tolist()):
        y = int(labels[i])
        closed = oracle.exact(rows[i].tolist(), y, float(margins[y]), gamma, s)
        for part, whole in zip(closed, terms, strict=True):
            torch.testing.assert_close(whole[k], part, rtol=1e-12, atol=1e-290)


def test_closed_form_at_a_gap_that_float64_cannot_hold():
    # focal loss and its slope at odds x = e^-100 are x^(1 + gamma) and (1 + gamma) x^(1 + gamma) to first order
    terms = oracle.exact([100.0, 0.0], 0, 0.0, 1.5, 2.0)
    torch.testing.assert_close(terms.focal.log().item(), -250.0, rtol=1e-14, atol=0)
    torch.testing.assert_close(terms.ldam.log().item(), -200.0, rtol=1e-14, atol=0)
    torch.testing.assert_close((terms.d_focal / terms.focal).tolist(), [-2.5, 2.5], rtol=1e-14, atol=0)
    torch.testing.assert_close((terms.d_ldam / terms.ldam).tolist(), [-2.0, 2.0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_oracle_is_cross_entropy_where_it_should_be(reduction):
    z = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    y, w = torch.randint(0, 4, (6, 5)), torch.rand(4, dtype=torch.float64)
    y[0] = 2
    loss, grad = oracle.expected(z, y, s=1.0, beta=0.0, weight=w, ignore_index=2, reduction=reduction)
    want = F.cross_entropy(z, y, w, ignore_index=2, reduction=reduction)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), z)[0])


def test_bar_rejects():
    exact = torch.tensor([1.0, 1e-20, 0.0, torch.inf], dtype=torch.float64)
    assert_exact(exact.float(), exact)
    for at, wrong in ((0, 1.00003), (1, 1.00003e-20), (2, 1e-25), (2, torch.nan), (3, 1e38), (3, -torch.inf)):
        actual = exact.float()
        actual[at] = wrong
        with pytest.raises(AssertionError, match="off"):
            assert_exact(actual, exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_exact(exact.float()[:1], exact)
    with pytest.raises(AssertionError, match="off"):
        assert_exact(torch.tensor([1.0078125], dtype=torch.bfloat16), torch.tensor([1.003], dtype=torch.float64))


def test_pairwise_covers_every_allowed_pair():
    factors = {"a": (1, 2, 3), "b": (1, 2, 3, 4), "c": "xyz", "d": (False, True)}

    def allowed(case):
        return not (case.get("a") == 3 and case.get("b") == 4)

    cases = pairwise(factors, allowed)
    assert cases == pairwise(factors, allowed)
    assert all(allowed(case) for case in cases)
    assert len(cases) < 20
    for p, q in combinations(factors, 2):
        met = {(case[p], case[q]) for case in cases}
        assert met == {
            pair for pair in product(factors[p], factors[q]) if allowed(dict(zip((p, q), pair, strict=True)))
        }
