"""The edges of the specification in their order of precedence, in every position of a row."""

from __future__ import annotations

import math

import pytest
import torch
from checks import DTYPES, check
from oracle import expected
from pairwise import pairs

from lmf_kernels import lmf_loss

INF, NAN = math.inf, math.nan

# row -> (loss kind, gradient kind); the label is 0
ZOO = [
    ([0.0, 1.0, 2.0, NAN], "nan"),
    ([NAN, 1.0, 2.0, 3.0], "nan"),
    ([NAN, -INF, -INF, -INF], "nan"),
    ([-INF, -INF, NAN, -INF], "nan"),
    ([1.0, -INF, -INF, NAN], "nan"),
    ([NAN, INF, INF, INF], "nan"),
    ([INF, 1.0, 2.0, 3.0], "nan"),
    ([INF, -INF, -INF, -INF], "nan"),
    ([0.0, 1.0, INF, 2.0], "nan"),
    ([0.0, INF, INF, INF], "nan"),
    ([INF, INF, 0.0, 0.0], "nan"),
    ([-INF, INF, 0.0, 0.0], "nan"),
    ([-INF, -INF, -INF, -INF], "nan"),
    ([1.0, -INF, -INF, -INF], "zero"),
    ([-300.0, -INF, -INF, -INF], "zero"),
    ([-INF, 1.0, 2.0, 3.0], "infinite"),
    ([-INF, -INF, 2.0, -INF], "infinite"),
    ([-INF, 2.0, 2.0, 2.0], "infinite"),
    ([1.0, -INF, 2.0, -INF], "finite"),
    ([1.0, -INF, -INF, 0.5], "finite"),
    ([2.0, 2.0, 2.0, 2.0], "finite"),
    ([0.0, -0.0, 0.0, -0.0], "finite"),
]


@pairs(gamma=(0.0, 0.5, 1.0, 2.0), dtype=DTYPES, terms=((1.3, 0.7), (1.3, 0.0), (0.0, 0.7)))
def test_special_rows(gamma, dtype, terms, backend):
    logits = torch.tensor([row for row, _ in ZOO], dtype=dtype)
    target = torch.zeros(len(ZOO), dtype=torch.long)
    margins = torch.tensor([0.3, -0.1, 0.0, 0.2])
    options = dict(margins=margins, gamma=gamma, alpha=terms[0], beta=terms[1], s=30.0, reduction="none")
    loss, grad = check(logits, target, backend, **options)
    for i, (row, kind) in enumerate(ZOO):
        grads = grad[i].tolist()
        if kind == "nan":
            assert loss[i].isnan() and all(map(math.isnan, grads)), row
        elif kind == "zero":
            assert loss[i] == 0 and grads == [0.0] * 4, row
        else:
            assert math.isinf(loss[i]) == (kind == "infinite") and loss[i] >= 0, row
            assert all(map(math.isfinite, grads)), row


@pytest.mark.parametrize("row, kind", ZOO)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_special_row_among_ordinary_ones(row, kind, reduction, backend):
    logits = torch.randn(5, 4)
    logits[2] = torch.tensor(row)
    loss, grad = check(logits, torch.tensor([1, 2, 0, 3, 0]), backend, reduction=reduction)
    assert {"nan": loss.isnan(), "infinite": loss.isposinf()}.get(kind, loss.isfinite())
    assert grad[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("z_y, kind", [(1.0, "zero"), (-50.0, "zero"), (NAN, "nan"), (INF, "nan"), (-INF, "nan")])
def test_one_class(z_y, kind, backend):
    loss, grad = check(torch.tensor([[z_y]]), torch.tensor([0]), backend, margins=torch.tensor([0.5]), reduction="none")
    assert (loss.isnan() & grad.isnan()).all() if kind == "nan" else (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("special", [NAN, INF])
@pytest.mark.parametrize("classes", [2, 7, 16, 37, 130])
def test_special_value_at_every_place(special, classes, backend):
    places = torch.arange(classes)
    logits = torch.randn(classes, classes)
    logits[places, places] = special
    for target in (places, places.roll(1)):
        loss, grad = check(logits, target, backend, reduction="none")
        assert loss.isnan().all() and grad.isnan().all()


@pytest.mark.parametrize("classes", [2, 7, 16, 37, 130])
def test_only_competitor_at_every_place(classes, backend):
    places = torch.arange(classes)
    logits = torch.full((classes, classes), -INF)
    logits[places, places] = torch.randn(classes)
    target = places.roll(1)
    check(logits, target, backend, reduction="none")  # z_y = -inf
    logits[places, target] = torch.randn(classes)
    check(logits, target, backend, reduction="none")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 1, 255, -1, 2**40, -(2**62)])
def test_ignored_rows_hold_anything(ignore_index, reduction, backend):
    logits = torch.randn(6, 4)
    logits[0], logits[2], logits[5] = NAN, INF, -INF
    logits[3, 1] = NAN
    target = torch.tensor([ignore_index, 0, ignore_index, ignore_index, 2, ignore_index])
    loss, grad = check(
        logits, target, backend, ignore_index=ignore_index, reduction=reduction, weight=torch.rand(4) + 0.5
    )
    assert loss.isfinite().all()
    assert (grad[[0, 2, 3, 5]] == 0).all()


@pytest.mark.parametrize("outer", [INF, NAN, 0.0])
def test_rows_that_do_not_move_ignore_the_upstream_gradient(outer, backend):
    logits = torch.tensor([[NAN, 1.0, 2.0], [1.0, -INF, -INF], [NAN, 0.0, 0.0]])
    target, weight = torch.tensor([-100, 0, 1]), torch.tensor([1.0, 0.0, 1.0])
    grad_output = torch.full((3,), outer)
    loss, grad = check(logits, target, backend, grad_output, weight=weight, reduction="none")
    assert loss.tolist() == [0, 0, 0] and (grad == 0).all()


@pytest.mark.parametrize(
    "row", [[NAN, 0.0, 1.0], [0.0, INF, 1.0], [-INF, 0.0, 1.0], [-INF, -INF, -INF], [0.5, 0.0, 1.0]]
)
@pytest.mark.parametrize("zero", ["weight", "ldam_weight", "focal_weight"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_zero_class_weight_hides_the_row_from_its_term(row, zero, reduction, backend):
    logits = torch.tensor([[1.0, 2.0, 3.0], row, [0.5, 0.0, -1.0]])
    target = torch.tensor([1, 0, 2])
    weight = torch.tensor([0.0, 2.0, 0.5])
    check(logits, target, backend, reduction=reduction, **{zero: weight})
    for alpha, beta in ((1.3, 0.0), (0.0, 0.7)):
        loss, grad = check(logits, target, backend, reduction=reduction, alpha=alpha, beta=beta, **{zero: weight})
        hidden = zero == "weight" or zero == ("ldam_weight" if alpha else "focal_weight")
        if hidden:
            assert loss.isfinite().all() and (grad[1] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_term_with_coefficient_zero_is_not_evaluated(reduction, backend):
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    nothing = torch.full((3,), NAN)
    check(logits, target, backend, alpha=0.0, ldam_weight=nothing, margins=nothing, reduction=reduction)
    check(logits, target, backend, beta=0.0, focal_weight=nothing, reduction=reduction)
    loss, grad = check(logits, target, backend, alpha=0.0, beta=0.0, reduction=reduction)
    assert (loss == 0).all() and (grad == 0).all()


BAD_LABELS = [4, 5, -1, -101, 1000, 2**31, 2**32 + 1, 2**62, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label", BAD_LABELS)
def test_bad_label(label, reduction, backend):
    logits, target = torch.randn(6, 4), torch.tensor([0, 3, label, -100, 1, 2])
    options = dict(weight=torch.rand(4) + 0.5, reduction=reduction)
    if backend != "triton":
        with pytest.raises(IndexError, match=rf"(?s)target.*{label}|{label}.*target"):
            lmf_loss(logits, target, backend=backend, **options)
        return
    _, grad = check(logits, target, backend, **options)
    assert grad[2].isnan().all() and grad[[0, 1, 4, 5]].isfinite().all() and (grad[3] == 0).all()


def test_label_equal_to_the_default_ignore_index_is_bad_when_another_is_ignored(backend):
    logits, target = torch.randn(3, 4), torch.tensor([0, -100, 2])
    if backend == "triton":
        assert check(logits, target, backend, ignore_index=0, reduction="none")[0].isnan().tolist() == [
            False,
            True,
            False,
        ]
    else:
        with pytest.raises(IndexError, match="-100"):
            lmf_loss(logits, target, ignore_index=0, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_loss_goes_on_after_a_bad_label(backend):
    logits = torch.randn(1000, 8)
    target = torch.randint(0, 8, (1000,))
    with pytest.raises(IndexError):
        lmf_loss(logits, target.clone().fill_(8), backend=backend)
    check(logits, target, backend)


def test_oracle_states_the_precedence():
    """A bad label comes before weights, an ignored row before everything."""
    logits = torch.tensor([[NAN, 0.0], [NAN, 0.0], [0.0, 1.0]])
    loss, _ = expected(logits, torch.tensor([-100, 0, 7]), weight=torch.tensor([0.0, 1.0]), reduction="none")
    assert loss[:2].tolist() == [0, 0] and loss[2].isnan()
