"""Class counts, and the margins and weights made of them, against their published formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmf_kernels import class_counts, effective_number_weights, inverse_frequency_weights, ldam_margins

COUNTS = [4693, 779, 769, 360, 229, 100, 81]
FROM_COUNTS = [ldam_margins, effective_number_weights, inverse_frequency_weights]


def close(actual, want):
    np.testing.assert_allclose(actual.double().numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("max_m", [0.5, 0.8, 0.0, 2.0])
def test_ldam_margins(max_m):
    n = np.array(COUNTS, dtype=float)
    inverse = 1 / np.sqrt(np.sqrt(n))
    close(ldam_margins(COUNTS, max_m), inverse * max_m / inverse.max())
    assert ldam_margins(COUNTS)[-1] == 0.5


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999, 0.9999999])
def test_effective_number_weights(beta):
    n = np.array(COUNTS, dtype=np.longdouble)
    weights = (1 - beta) / (1 - np.longdouble(beta) ** n)
    close(effective_number_weights(COUNTS, beta), (weights / weights.sum() * len(n)).astype(float))
    torch.testing.assert_close(effective_number_weights(COUNTS, beta).sum().item(), 7.0, rtol=1e-6, atol=0)


def test_effective_number_weights_of_a_huge_class():
    weights = effective_number_weights([10**9, 1], beta=0.9999)
    close(weights, np.array([1e-4, 1.0]) / 1.0001 * 2)


def test_inverse_frequency_weights():
    n = np.array(COUNTS, dtype=float)
    close(inverse_frequency_weights(COUNTS), (1 - n / n.sum()) / (len(n) - 1))
    close(inverse_frequency_weights([1, 1]), [0.5, 0.5])


@pytest.mark.parametrize("function", FROM_COUNTS)
def test_kinds_of_counts(function):
    want = function(COUNTS)
    assert want.shape == (7,) and want.dtype == torch.float32 and not want.requires_grad
    for given in (tuple(COUNTS), np.array(COUNTS), torch.tensor(COUNTS), torch.tensor(COUNTS, dtype=torch.float32)):
        assert torch.equal(function(given), want)


@pytest.mark.parametrize("function", FROM_COUNTS)
@pytest.mark.parametrize("count", [0, -3, float("nan"), float("inf")])
def test_bad_count_names_the_class(function, count):
    with pytest.raises(ValueError, match=r"cls_num_list.*class 2"):
        function([5, 7, count, 9])


@pytest.mark.parametrize("function", FROM_COUNTS)
@pytest.mark.parametrize("given", [[], [[1, 2], [3, 4]], 5])
def test_bad_shape_of_counts(function, given):
    with pytest.raises((ValueError, TypeError), match="cls_num_list"):
        function(given)


@pytest.mark.parametrize("function", FROM_COUNTS)
@pytest.mark.parametrize("given", [None, "abc", ["a", "b"], [1, None]])
def test_counts_that_are_no_numbers(function, given):
    with pytest.raises(TypeError, match="cls_num_list"):
        function(given)


@pytest.mark.parametrize("beta", [1.0, -0.1, 1.5, float("nan")])
def test_effective_number_beta_out_of_range(beta):
    with pytest.raises(ValueError, match="beta"):
        effective_number_weights(COUNTS, beta)


def test_inverse_frequency_needs_two_classes():
    with pytest.raises(ValueError, match=r"2 classes.*1"):
        inverse_frequency_weights([5])


@pytest.mark.parametrize("function", [ldam_margins, effective_number_weights])
def test_one_class(function):
    assert function([5]).shape == (1,)


@pytest.mark.parametrize("max_m", [float("nan"), float("inf")])
def test_margin_must_be_finite(max_m):
    with pytest.raises(ValueError, match="max_m"):
        ldam_margins(COUNTS, max_m)


class _Dataset:
    def __init__(self, targets):
        self.targets = targets


LABELS = [0, 2, 2, 3, 0, 2]


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        tuple(LABELS),
        np.array(LABELS),
        np.array(LABELS, dtype=np.uint8),
        torch.tensor(LABELS),
        torch.tensor(LABELS, dtype=torch.int32),
        torch.tensor(LABELS).view(2, 3),
        _Dataset(LABELS),
        _Dataset(torch.tensor(LABELS)),
    ],
)
def test_class_counts(labels):
    assert torch.as_tensor(class_counts(labels, 5)).tolist() == [2, 0, 3, 1, 0]


def test_class_counts_of_nothing():
    assert torch.as_tensor(class_counts([], 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("labels, word", [([0, 4], "4"), ([0, -1], "-1"), ([0, 1, 100], "100")])
def test_class_counts_of_labels_out_of_range(labels, word):
    with pytest.raises(ValueError, match=rf"labels.*{word}"):
        class_counts(labels, 4)


@pytest.mark.parametrize("labels", [[0.5, 1.0], torch.rand(3), np.array([1.0, 2.0])])
def test_class_counts_of_labels_that_are_no_integers(labels):
    with pytest.raises(TypeError, match="labels"):
        class_counts(labels, 4)


def test_class_counts_needs_a_class():
    with pytest.raises(ValueError, match="num_classes"):
        class_counts([], 0)
