"""What a reader returns: every labelled image of a dataset, before it is split."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError

PARTS = ("train", "val", "test")
SMALLEST_CLASS = 3  # one sample each for training, validation and test


@dataclass(frozen=True)
class Samples:
    """Labelled images.

    Attributes:
        name: What to call the data in the output.
        class_names: C names, in label order.
        labels: (n,) int64 in [0, C).
        images: Image files, or one tensor (n, channels, height, width), uint8 or float in [0, 1].
        published_parts: (n,) indices into ``PARTS`` where the data come with a split of their own.
        train_proportions: C relative class sizes to which the training part alone is thinned.
        groups: (n,) lesions or patients, of which several images may exist.
        group_name: What a group is.
        published_counts: (C,) images of each class in the complete dataset.
    """

    name: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    images: list[Path] | torch.Tensor
    published_parts: np.ndarray | None = None
    train_proportions: tuple[float, ...] | None = None
    groups: np.ndarray | None = None
    group_name: str = "group"
    published_counts: tuple[int, ...] | None = None

    @property
    def counts(self) -> np.ndarray:
        """(C,) images of each class."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    @property
    def channels(self) -> int:
        """Colour channels of an image; files are read as RGB."""
        return 3 if isinstance(self.images, list) else self.images.shape[1]

    @property
    def incomplete(self) -> str | None:
        """Which class counts are not the published ones; None where they are, or where none are known."""
        if self.published_counts is None or tuple(self.counts) == self.published_counts:
            return None
        rows = zip(self.class_names, self.counts, self.published_counts, strict=True)
        different = ", ".join(f"{name} {own} of {published}" for name, own, published in rows if own != published)
        return f"{len(self.labels)} of {sum(self.published_counts)} published images ({different})"

    def select(self, kept: np.ndarray) -> "Samples":
        """The samples at the indices ``kept``."""
        images = [self.images[i] for i in kept] if isinstance(self.images, list) else self.images[kept]
        parts = None if self.published_parts is None else self.published_parts[kept]
        groups = None if self.groups is None else self.groups[kept]
        return replace(self, labels=self.labels[kept], images=images, published_parts=parts, groups=groups)

    def check(self) -> None:
        """Raise UserError if some class cannot be trained, validated and tested."""
        if len(self.class_names) < 2:
            raise UserError(f"{self.name} has {len(self.class_names)} class, but at least 2 are needed")
        for class_name, count in zip(self.class_names, self.counts, strict=True):
            if count < SMALLEST_CLASS:
                raise UserError(
                    f"{self.name}: class {class_name!r} has {count} images, but at least {SMALLEST_CLASS} "
                    "are needed (one each for training, validation and test)"
                )
