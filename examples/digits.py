"""Data of the examples: scikit-learn's handwritten digits, thinned to a long tail (no download)."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def long_tailed_digits(size: int, held_out: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 1, 8, 8) and labels, `size` of digit 0 and ten times fewer of digit 9; balanced test set."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = [], []
    for digit in range(10):
        mine = (labels == digit).nonzero().flatten()
        test.append(mine[:held_out])
        train.append(mine[held_out:][: max(3, round(size * 0.1 ** (digit / 9)))])
    train, test = torch.cat(train), torch.cat(test)
    return images[train], labels[train], images[test], labels[test]
