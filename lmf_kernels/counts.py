"""Labels and class counts in the forms that people have them, as tensors."""

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ._validate import as_float, check_dense, check_memory


class _Array(Protocol):
    """numpy's arrays, pandas' Series and whatever else becomes an array."""

    @property
    def __array__(self) -> Callable[..., Any]: ...


ClassCounts = Sequence[float] | Mapping[int, float] | Tensor | _Array

_MAP_NAMES = (
    "map names to class indices first, with one mapping for training and counts: sorted(set(names)), "
    "pandas.factorize(names, sort=True) or scikit-learn's LabelEncoder"
)


def class_counts(labels: Any, num_classes: int, *, ignore_index: int | None = None) -> Tensor:
    """Counts the samples of each class: n_j = #{i : labels[i] = j}.

    Args:
        labels: class indices of any shape as a tensor, array, sequence or pandas Series (whose index plays no part); or
            a dataset that has them as `.targets` or `.labels`, a `TensorDataset` (inputs, labels), and a `Subset` or
            `ConcatDataset` of these. No item of a dataset is ever fetched.
        num_classes: C, at least 1; classes without a sample count 0.
        ignore_index: a label that is not counted, as 255 in the masks of many data sets; None counts all.

    Returns:
        The counts, shape (C,), int64, on the CPU.

    Raises:
        TypeError: the labels are not integers (names, say), or cannot be had without fetching a dataset's items;
            `num_classes` or `ignore_index` is not an integer.
        ValueError: a label lies outside [0, C), the labels are one-hot, or `num_classes` lies outside [1, 2^31).
    """
    if not isinstance(num_classes, numbers.Integral):
        raise TypeError(f"num_classes must be an integer, got {type(num_classes).__name__}")
    if not 1 <= num_classes < 2**31:
        raise ValueError(f"num_classes must be at least 1 and below 2^31, got {num_classes}")
    if ignore_index is not None:
        if not isinstance(ignore_index, numbers.Integral):
            raise TypeError(f"ignore_index must be an integer or None, got {type(ignore_index).__name__}")
        if not -(2**63) <= ignore_index < 2**63:
            raise ValueError(f"ignore_index must fit into int64, got {ignore_index}")
    labels = _labels(labels)
    if labels.numel() == 0:
        return torch.zeros(num_classes, dtype=torch.int64, device="cpu")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer class indices, got dtype {labels.dtype}")
    labels = labels.long()
    if labels.dim() == 2 and labels.shape[1] == num_classes and _is_one_hot(labels):
        raise ValueError(
            f"labels must be class indices, got one-hot rows of shape {tuple(labels.shape)}: pass labels.argmax(1)"
        )
    labels = labels.reshape(-1)
    if ignore_index is not None:
        labels = labels[labels != ignore_index]
        if labels.numel() == 0:
            return torch.zeros(num_classes, dtype=torch.int64, device="cpu")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"labels must lie in [0, {num_classes}) for num_classes={num_classes}, got {wrong}; if that marks what is "
            f"not to be counted, pass ignore_index={wrong}"
        )
    return torch.bincount(labels, minlength=num_classes)


def read_counts(cls_num_list: ClassCounts) -> Tensor:
    """The counts as a float64 CPU tensor, (C,), whatever their values; class j's count is in place j."""
    if isinstance(cls_num_list, Mapping):
        return _by_class(list(cls_num_list), list(cls_num_list.values()), "keys")
    index = getattr(cls_num_list, "index", None)
    if hasattr(index, "tolist") and getattr(cls_num_list, "ndim", 0) == 1:  # a pandas Series, in any order
        return _by_class(cast(Any, index).tolist(), cast(Any, cls_num_list).tolist(), "index")
    counts = _dense(
        "cls_num_list", cls_num_list, "a sequence of class counts", "pass class_counts(labels, num_classes)"
    )
    if counts.is_complex():
        raise TypeError(f"cls_num_list must hold real counts, got dtype {counts.dtype}")
    if counts.dim() != 1:
        raise ValueError(f"cls_num_list must hold one count a class, shape (C,), got shape {tuple(counts.shape)}")
    return counts.to(torch.float64)


def check_counts(counts: Tensor, min_count: float | None = None) -> Tensor:
    """The counts, each at least `min_count` where that is given; raises for what is no count of samples."""
    if min_count is not None:
        if not isinstance(min_count, numbers.Real) or isinstance(min_count, bool):
            raise TypeError(f"min_count must be a number or None, got {type(min_count).__name__}")
        if not 1 <= as_float(min_count) < float("inf"):
            raise ValueError(f"min_count must be finite and >= 1, got {min_count}")
    if len(counts) == 0:
        raise ValueError("cls_num_list must hold one count a class, shape (C,), got shape (0,)")
    empty = []
    for index, count in enumerate(counts.tolist()):
        if count == 0:
            empty.append(index)
        elif not (1 if min_count is None else 0) <= count < float("inf"):
            raise ValueError(f"cls_num_list must hold counts >= 1, got {count:g} for class {index}")
    if empty and min_count is None:
        raise _no_samples(empty)
    return counts if min_count is None else counts.clamp(min=float(min_count))


def checked_counts(cls_num_list: ClassCounts, min_count: float | None = None) -> Tensor:
    """The checked counts as a float64 CPU tensor, (C,)."""
    return check_counts(read_counts(cls_num_list), min_count)


def _no_samples(classes: Sequence[int]) -> ValueError:
    named = ", ".join(map(str, classes[:10])) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
    return ValueError(
        f"cls_num_list must hold counts >= 1, got 0 for class{'es' if len(classes) > 1 else ''} {named}: no training "
        "samples. Count before the split or split by class (stratified), leave such classes out of the model, or "
        "treat each as one sample with min_count=1"
    )


def _by_class(classes: Sequence[Any], counts: Sequence[Any], what: str) -> Tensor:
    """The counts in the order of the class indices that they belong to; a class that is left out has none."""
    for key in classes:
        if not isinstance(key, numbers.Integral) or isinstance(key, bool):
            raise TypeError(
                f"cls_num_list must have class indices 0 to C-1 as its {what}, got {key!r} "
                f"({type(key).__name__}); {_MAP_NAMES}"
            )
    if not classes:
        raise ValueError("cls_num_list must hold one count a class, got none")
    found = {int(key): count for key, count in zip(classes, counts, strict=True)}
    if len(found) != len(classes):
        twice = next(key for i, key in enumerate(classes) if key in classes[:i])
        raise ValueError(f"cls_num_list must have each class once in its {what}, got {twice} more than once")
    low, high = min(found), max(found)
    if low < 0 or high >= 2**31:
        raise ValueError(f"cls_num_list must have class indices 0 to C-1 as its {what}, got {low if low < 0 else high}")
    if high >= 10_000_000 and high + 1 > 2 * len(found):  # no classes, but numbers of something else
        raise ValueError(
            f"cls_num_list must have class indices 0 to C-1 as its {what}, got {len(found)} keys up to {high}; "
            "number the classes anew, from 0"
        )
    values = _dense("cls_num_list", list(found.values()), "class counts", "pass class_counts(labels, num_classes)")
    if values.is_complex() or values.dim() != 1:
        raise TypeError(f"cls_num_list must hold one real count a class, got {values.dtype}, {tuple(values.shape)}")
    ordered = torch.zeros(high + 1, dtype=torch.float64, device="cpu")
    ordered[torch.tensor(list(found), device="cpu")] = values.to(torch.float64)
    return ordered


def _labels(labels: Any) -> Tensor:
    """The labels as a tensor in the CPU's memory; a dataset's from its attributes, without fetching an item."""
    expected = "integer class indices"
    if isinstance(labels, Tensor) or hasattr(labels, "__array__") or _is_sequence(labels):
        if getattr(labels, "columns", None) is not None and len(labels.columns) != 1:
            raise ValueError(f"labels must be one column of class indices, got a table with {len(labels.columns)}")
        return _dense("labels", labels, expected, "pass one column")
    if hasattr(labels, "indices") and hasattr(labels, "dataset"):  # Subset, also of a Subset
        indices = _dense("labels", labels.indices, "a subset with integer indices", "")
        return _labels(labels.dataset)[indices.long()]
    if isinstance(getattr(labels, "datasets", None), (list, tuple)):  # ConcatDataset
        return torch.cat([_labels(dataset) for dataset in labels.datasets])
    for name in ("targets", "labels"):
        found = getattr(labels, name, None)
        if found is not None and not callable(found):
            return _of_dataset(
                labels, name, _dense("labels", found, expected, f"{_what(labels)}.{name} holds no labels")
            )
    tensors = getattr(labels, "tensors", None)
    if isinstance(tensors, tuple) and len(tensors) == 2:  # TensorDataset(inputs, labels)
        return _dense("labels", tensors[1], expected, "")
    if isinstance(labels, str | bytes) or not (hasattr(labels, "__getitem__") or hasattr(labels, "__iter__")):
        raise TypeError(f"labels must be {expected}, got {_what(labels)}")
    raise TypeError(
        f"labels must be {expected}, got {_what(labels)}, of which no item is fetched to find its label: pass the "
        "labels of all samples as a tensor, array or list (dataset.targets, dataset.tensors[1], frame['label'], "
        "[label for _, label in dataset.samples])"
    )


def _of_dataset(dataset: Any, name: str, labels: Tensor) -> Tensor:
    try:
        size = len(dataset)
    except Exception:  # without a length, or with one that it does not know yet
        return labels
    if labels.dim() and len(labels) != size:
        raise ValueError(
            f"labels must be one for each item, but {_what(dataset)}.{name} holds {len(labels)} for {size} items: "
            "pass the labels themselves"
        )
    return labels


def _is_one_hot(labels: Tensor) -> bool:
    return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all())


def _is_sequence(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray)


def _dense(name: str, values: Any, expected: str, hint: str) -> Tensor:
    """`values` as a tensor in the CPU's memory, wherever new tensors are made (torch.device("meta"))."""
    if not isinstance(values, Tensor):
        if hasattr(values, "to_numpy"):
            values = values.to_numpy()  # of pandas; torch would look its rows up by the index
        elif _is_sequence(values) and not isinstance(values, list | tuple | range):
            values = list(values)
        if not hasattr(values, "__array__") and not _is_sequence(values) and not isinstance(values, numbers.Number):
            raise TypeError(f"{name} must be {expected}, got {_what(values)}{'; ' if hint else ''}{hint}")
        writeable = getattr(getattr(values, "flags", None), "writeable", None)
        if writeable is False or (writeable and min(values.strides, default=0) < 0):  # torch takes neither
            values = values.copy()
        try:
            values = torch.as_tensor(values, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            if _holds_names(values):
                raise TypeError(f"{name} must be {expected}, got names; {_MAP_NAMES}") from error
            raise TypeError(f"{name} must be {expected}, got {type(values).__name__} ({error})") from error
    check_dense(name, values)
    if values.is_quantized or values.is_meta:
        raise TypeError(f"{name} must be {expected}, got a {'meta' if values.is_meta else 'quantized'} tensor")
    check_memory(name, values)
    return cast(Tensor, values.detach().cpu())


def _holds_names(values: Iterable[Any]) -> bool:
    """Whether the first value is a string."""
    try:
        first = next(iter(values), None)
    except TypeError:
        return False
    return isinstance(first, str | bytes)


def _what(values: Any) -> str:
    if isinstance(values, str | bytes):
        return f"the string {values!r:.40}"
    return type(values).__name__
