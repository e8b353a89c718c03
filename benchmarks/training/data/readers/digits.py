"""scikit-learn's handwritten digits, made long-tailed; they are shipped with the package."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from ...errors import UserError
from ..samples import Samples

# NV, MEL, BKL, BCC, AKIEC, VASC, DF: the training counts of HAM10000 in Table 2 of the paper.
HAM10000_TRAIN_COUNTS = (4693, 779, 769, 360, 229, 100, 81)


def read_digits(argument: str) -> Samples:
    """1797 real 8x8 digits whose training part is thinned.

    Without an argument: seven classes (0 to 3 merged, 4, ..., 9) in HAM10000's proportions. With a ratio: ten classes
    whose sizes fall exponentially, the largest being ``ratio`` times the smallest.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16.0).float().unsqueeze(1)  # (1797, 1, 8, 8)
    if not argument:
        labels = np.maximum(digits.target - 3, 0).astype(np.int64)
        names = ("0-3", "4", "5", "6", "7", "8", "9")
        return Samples(
            "digits, long-tailed like HAM10000", names, labels, images, train_proportions=HAM10000_TRAIN_COUNTS
        )
    ratio = _ratio(argument)
    return Samples(
        name=f"digits, long-tailed at ratio {ratio:g}",
        class_names=tuple("0123456789"),
        labels=digits.target.astype(np.int64),
        images=images,
        train_proportions=tuple(ratio ** (-label / 9) for label in range(10)),
    )


def _ratio(argument: str) -> float:
    try:
        ratio = float(argument)
    except ValueError:
        ratio = 0.0
    if not 1 <= ratio <= 100:
        raise UserError(f"--data digits:{argument}: the imbalance ratio must be a number from 1 to 100")
    return ratio
