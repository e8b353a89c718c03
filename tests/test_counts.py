"""Labels and class counts in the forms that people have them; what would be counted wrongly is refused in words."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

import lmf_kernels
from lmf_kernels import (
    DeferredReweighting,
    LDAMLoss,
    LinearLMFLoss,
    LMFLoss,
    class_counts,
    effective_number_weights,
    inverse_frequency_weights,
    ldam_margins,
)

COUNTS = [500, 80, 9, 40]
SHUFFLED = (2, 0, 3, 1)
LABELS = [0, 2, 2, 3, 0, 2]
WANT = [2, 0, 3, 1, 0]

FROM_COUNTS = {
    "ldam_margins": ldam_margins,
    "effective_number_weights": effective_number_weights,
    "inverse_frequency_weights": inverse_frequency_weights,
    "LMFLoss": lambda counts, **kw: LMFLoss(counts, **kw).margins,
    "LDAMLoss": lambda counts, **kw: LDAMLoss(counts, **kw).margins,
    "LinearLMFLoss": lambda counts, **kw: LinearLMFLoss(3, counts, **kw).margins,
    "DeferredReweighting": lambda counts, **kw: DeferredReweighting(LDAMLoss(COUNTS), counts, **kw).weight,
}


@pytest.fixture
def pandas():
    return pytest.importorskip("pandas")


@pytest.fixture(params=list(FROM_COUNTS))
def function(request):
    return FROM_COUNTS[request.param]


# ---- counts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given",
    [
        tuple(COUNTS),
        np.array(COUNTS),
        torch.tensor(COUNTS),
        {j: COUNTS[j] for j in SHUFFLED},
        {np.int64(j): np.int64(COUNTS[j]) for j in SHUFFLED},
        collections.Counter({j: COUNTS[j] for j in SHUFFLED}),
        collections.deque(COUNTS),
    ],
    ids=lambda given: type(given).__name__,
)
def test_forms_of_counts(function, given):
    assert torch.equal(function(given), function(COUNTS))


def test_a_series_is_aligned_by_its_index(function, pandas):
    """value_counts() is in the order of frequencies, by which every class got another one's margin."""
    labels = pandas.Series(np.repeat(range(4), COUNTS))
    by_frequency = labels.value_counts()
    assert by_frequency.index.tolist() == [0, 1, 3, 2]
    for given in (by_frequency, labels.value_counts(sort=False), by_frequency.astype("Int64"), pandas.Series(COUNTS)):
        assert torch.equal(function(given), function(COUNTS))


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (["mel", "nv", "bkl"], TypeError, "index, got 'mel'.*pandas.factorize"),
        ([0, 1, 1], ValueError, "each class once in its index, got 1 more than once"),
        ([1, 2, 3], ValueError, "class 0: no training samples"),
        ([-1, 0, 1], ValueError, "index, got -1"),
        ([0.0, 1.0, 2.0], TypeError, "index, got 0.0"),
    ],
)
def test_a_series_of_something_else_is_refused(function, index, error, words, pandas):
    with pytest.raises(error, match=f"cls_num_list .*{words}"):
        function(pandas.Series([5, 6, 7], index=index))


def test_a_frame_is_refused(pandas):
    with pytest.raises(ValueError, match=r"cls_num_list .*shape \(3, 1\)"):
        ldam_margins(pandas.DataFrame({"n": [3, 2, 1]}, index=[2, 1, 0]))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"mel": 3, "nv": 4}, TypeError, r"keys, got 'mel'.*sorted\(set\(names\)\)"),
        ({True: 3, False: 4}, TypeError, "keys, got True"),
        ({0: 3, -1: 4}, ValueError, "keys, got -1"),
        ({0: 3, 2**40: 4}, ValueError, f"keys, got {2**40}"),
        ({0: 3, 2**30: 4}, ValueError, "number the classes anew"),
        ({0: 3, 1: "many"}, TypeError, "class counts"),
        ({}, ValueError, "got none"),
        (collections.Counter([0, 0, 1, 3]), ValueError, "class 2: no training samples"),
        (["mel", "nv"], TypeError, "names.*LabelEncoder"),
        ("mel", TypeError, "the string 'mel'"),
        ({3, 4}, TypeError, "class_counts"),
    ],
)
def test_counts_that_are_refused(given, error, words):
    with pytest.raises(error, match=f"cls_num_list .*{words}"):
        ldam_margins(given)


@pytest.mark.parametrize("given", [[5, 0, 7, 0], {0: 5, 2: 7, 3: 0}, torch.tensor([5, 0, 7, 0])])
def test_classes_without_samples(function, given):
    with pytest.raises(ValueError, match=r"cls_num_list .* classes 1, 3: no training samples\..*min_count=1"):
        function(given)
    assert torch.equal(function(given, min_count=1), function([5, 1, 7, 1]))
    assert torch.equal(function(given, min_count=6), function([6, 6, 7, 6]))


def test_many_classes_without_samples_are_not_all_named():
    with pytest.raises(ValueError, match=r"classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 90 more: no"):
        ldam_margins([0] * 100 + [3])


@pytest.mark.parametrize("counts", [[3, -1], [3, float("nan")], [3, float("inf")]])
def test_min_count_makes_no_count_of_nonsense(counts):
    with pytest.raises(ValueError, match=r"cls_num_list .*class 1"):
        ldam_margins(counts, min_count=1)


@pytest.mark.parametrize(
    ("min_count", "error"), [(0, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)]
)
def test_min_count_out_of_range(min_count, error):
    for counts in ([3, 4], [3, 0]):
        with pytest.raises(error, match="min_count"):
            LMFLoss(counts, min_count=min_count)


# ---- labels ---------------------------------------------------------------------------------------------------------
class Images(Dataset):
    """A dataset whose items must not be touched."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        raise AssertionError("an item was fetched")


def counted(labels, **options):
    return class_counts(labels, 5, **options).tolist()


@pytest.mark.parametrize("values", [LABELS, tuple(LABELS), np.array(LABELS), torch.tensor(LABELS)])
@pytest.mark.parametrize("name", ["targets", "labels"])
def test_labels_of_datasets(name, values):
    dataset = Images(**{name: values})
    assert counted(dataset) == WANT
    assert counted(Subset(dataset, [0, 1, 5])) == [1, 0, 2, 0, 0]
    assert counted(Subset(Subset(dataset, torch.tensor([5, 3, 1])), np.array([0, 1]))) == [0, 0, 1, 1, 0]
    assert counted(Subset(dataset, [])) == [0] * 5
    parts = random_split(dataset, [4, 2])
    assert [sum(pair) for pair in zip(*map(counted, parts), strict=True)] == WANT
    assert counted(ConcatDataset([dataset, parts[0], parts[1]])) == [2 * n for n in WANT]


def test_labels_of_a_tensor_dataset():
    dataset = TensorDataset(torch.randn(6, 3), torch.tensor(LABELS))
    assert counted(dataset) == WANT
    assert counted(Subset(dataset, range(3))) == [1, 0, 2, 0, 0]


@pytest.mark.parametrize(
    "dataset",
    [
        Images(),
        Images(samples=[("a.png", 0)] * 6),
        Subset(Images(), [0, 1]),
        ConcatDataset([Images(), Images()]),
        TensorDataset(torch.zeros(6), torch.zeros(6).long(), torch.zeros(6)),
        {0: 3, 1: 4},
        (label for label in LABELS),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_labels_that_are_out_of_reach_are_asked_for(dataset):
    with pytest.raises(TypeError, match=r"labels .*no item is fetched.*pass the labels of all samples"):
        counted(dataset)
    with pytest.raises(TypeError, match="cls_num_list"):
        ldam_margins(Images())


def test_attributes_that_are_not_the_items_labels():
    with pytest.raises(ValueError, match=r"labels .*Images.labels holds 2 for 6 items"):
        counted(Images(labels=[0, 1]))
    with pytest.raises(TypeError, match=r"labels .*names"):
        counted(Images(labels=["cat", "dog"]))


@pytest.mark.filterwarnings("error")
def test_a_column_after_a_split(pandas):
    """Its index begins anywhere: torch looked the rows up by it (KeyError)."""
    frame = pandas.DataFrame({"x": 0.5, "label": [4, *LABELS]}).drop(index=0)
    for labels in (
        frame["label"],
        frame["label"].sample(frac=1.0, random_state=1),
        frame["label"][::-1],
        frame["label"].astype("category"),
        frame["label"].astype("Int64"),
        frame[["label"]],
        frame["label"].to_numpy(),
        pandas.Index(LABELS),
    ):
        assert counted(labels) == WANT
    assert torch.equal(ldam_margins(frame["label"].value_counts(), min_count=1), ldam_margins([2, 1, 3, 1]))
    with pytest.raises(ValueError, match=r"labels .*one column.*with 2"):
        counted(frame)


@pytest.mark.filterwarnings("error")
def test_arrays_that_torch_does_not_take_as_they_are():
    read_only = np.array(LABELS)
    read_only.flags.writeable = False
    for labels in (read_only, np.array(LABELS)[::-1]):
        assert counted(labels) == WANT


def test_names_are_refused_with_a_hint(pandas):
    names = ["nv", "mel", "nv"]
    for labels in (names, np.array(names), np.array(names, dtype=object), pandas.Series(names)):
        with pytest.raises(TypeError, match=r"labels .*names.*sorted\(set\(names\)\).*factorize.*LabelEncoder"):
            counted(labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_masks_with_an_ignored_value(dtype):
    masks = torch.tensor([[[0, 2], [255, 2]], [[3, 255], [0, 2]]], dtype=dtype)
    assert counted(masks, ignore_index=255) == WANT
    assert counted(masks.flatten().tolist(), ignore_index=255) == WANT
    assert counted(torch.full((3, 2), 255, dtype=dtype), ignore_index=255) == [0] * 5
    assert counted(masks.clamp(max=3), ignore_index=0) == [0, 0, 3, 3, 0]
    with pytest.raises(ValueError, match=r"labels .*255.*ignore_index=255"):
        counted(masks)


@pytest.mark.parametrize(("value", "error"), [(1.0, TypeError), ("255", TypeError), (2**63, ValueError)])
def test_ignore_index_of_another_kind(value, error):
    with pytest.raises(error, match="ignore_index"):
        counted(LABELS, ignore_index=value)


def test_one_hot_labels_are_refused():
    """Their zeros and ones were counted as labels."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(LABELS), 5)
    for labels in (one_hot, one_hot.numpy(), one_hot.tolist(), one_hot.int()):
        with pytest.raises(ValueError, match=r"labels .*one-hot.*argmax\(1\)"):
            counted(labels)
    assert counted(one_hot.argmax(1)) == WANT
    masks = torch.zeros(7, 5, dtype=torch.long)
    masks[:, :2] = 1  # one image of zeros and ones is no one-hot matrix
    assert counted(masks) == [21, 14, 0, 0, 0]
    assert counted(one_hot[None]) == [24, 6, 0, 0, 0]


def test_on_the_meta_device_counts_stay_on_the_host():
    with torch.device("meta"):
        counts = class_counts(LABELS, 5)
        assert counts.tolist() == WANT
        for function in (ldam_margins, effective_number_weights, inverse_frequency_weights):
            assert function(counts, min_count=1).isfinite().all()
            assert torch.equal(function({0: 3, 1: 2}), function([3, 2]))
        assert effective_number_weights([3, 2], beta=0).tolist() == [1, 1]
        assert class_counts([], 2).tolist() == [0, 0]


def test_pandas_is_not_imported():
    code = (
        "import sys; from lmf_kernels import LMFLoss, class_counts\n"
        "LMFLoss({0: 3, 1: 2}); class_counts([0, 1], 2)\nassert 'pandas' not in sys.modules"
    )
    root = Path(lmf_kernels.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
