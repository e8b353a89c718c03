"""Stratified 70:15:15 splits, and thinning the training part to a long tail.

By hand, because of rare classes: each has round(0.15 n) samples, at least one, in validation and in test, which gives
HAM10000's counts in the paper's Table 2. scikit-learn's stratified splits round over all classes together and refuse a
class of three samples; its StratifiedGroupKFold leaves rare classes out of folds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .samples import PARTS, Samples

HELD_OUT_SHARE = 0.15  # of every class, for validation and again for test


@dataclass(frozen=True)
class Split:
    """Sorted indices of each part."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def split_samples(samples: Samples, seed: int, grouped: bool) -> Split:
    """The published split or a stratified one drawn with ``seed``, its training part thinned if asked for.

    ``grouped`` keeps all images of a lesion or patient in one part.
    """
    rng = np.random.default_rng(seed)
    if samples.published_parts is not None:
        split = Split(*(np.flatnonzero(samples.published_parts == part) for part in range(len(PARTS))))
    elif grouped:
        split = _grouped(samples, rng)
    else:
        split = _stratified(samples.labels, rng)
    _check_parts(samples, split)
    if samples.train_proportions is None:
        return split
    return Split(thin(split.train, samples.labels, samples.train_proportions, rng), split.val, split.test)


def describe_split(samples: Samples, grouped: bool) -> str:
    """How the data are split, for the output."""
    if samples.published_parts is not None:
        return "as published with the data"
    text = "stratified 70:15:15, drawn with each seed"
    if samples.train_proportions is not None:
        text += ", the training part then thinned"
    if grouped:
        return f"{text}, grouped: all images of a {samples.group_name} are in one part"
    if samples.groups is None and samples.group_name != "group":
        return f"{text}, not grouped: the data do not tell which images are of one {samples.group_name}"
    if samples.groups is None or len(np.unique(samples.groups)) == len(samples.groups):
        return text
    return f"{text}, not grouped: images of one {samples.group_name} leak from training into test (as in the paper)"


def thin(indices: np.ndarray, labels: np.ndarray, proportions: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Drop samples until the class sizes have these proportions; the largest class stays whole."""
    wanted = np.asarray(proportions, dtype=np.float64)
    largest = int(wanted.argmax())
    sizes = np.rint(wanted / wanted[largest] * np.count_nonzero(labels[indices] == largest)).astype(int)
    kept = [rng.permutation(indices[labels[indices] == c])[: max(size, 1)] for c, size in enumerate(sizes)]
    return np.sort(np.concatenate(kept))


def _stratified(labels: np.ndarray, rng: np.random.Generator) -> Split:
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in range(labels.max() + 1):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out = max(1, round(HELD_OUT_SHARE * len(members))) if len(members) else 0
        cuts = [len(members) - 2 * held_out, len(members) - held_out]
        for part, chosen in zip(parts, np.split(members, cuts), strict=True):
            part.append(chosen)
    return Split(*(np.sort(np.concatenate(part)) for part in parts))


def _grouped(samples: Samples, rng: np.random.Generator) -> Split:
    """Stratify the groups by their rarest class, so that rare classes reach every part."""
    if samples.groups is None:
        raise UserError(f"--grouped: {samples.name} does not tell which images belong to one {samples.group_name}")
    groups, first = np.unique(samples.groups, return_index=True)
    group_labels = samples.labels[first]
    by_rarity = np.argsort(-samples.counts)  # the rarest class is written last and stays
    for label in by_rarity:
        group_labels[np.isin(groups, samples.groups[samples.labels == label])] = label
    parts = _stratified(group_labels, rng)
    return Split(*(np.flatnonzero(np.isin(samples.groups, groups[part])) for part in vars(parts).values()))


def _check_parts(samples: Samples, split: Split) -> None:
    for part in PARTS:
        counts = np.bincount(samples.labels[getattr(split, part)], minlength=len(samples.class_names))
        if not counts.all():
            missing = samples.class_names[int(counts.argmin())]
            raise UserError(f"{samples.name}: class {missing!r} has no image in the {part} part of the split")
