"""A user's script passes mypy --strict against the package, and what the types forbid does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lmf_kernels

pytest.importorskip("mypy", reason="mypy is not installed")

GOOD = """
from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn

from lmf_kernels import (
    DeferredReweighting, FocalLoss, LDAMLoss, LinearLMFLoss, LMFLoss, class_counts, global_normalizer, ldam_margins,
    linear_lmf_loss, lmf_loss,
)

labels = [0, 2, 1, 0]
counts: Tensor = class_counts(labels, num_classes=3, ignore_index=255)
criterion = LMFLoss(counts, reduction="none", weight=torch.ones(3), min_count=1)
others: list[nn.Module] = [
    LDAMLoss([5, 6, 7]), LDAMLoss((5, 6)), LMFLoss({0: 5, 1: 6}), LMFLoss(Counter(labels)), LMFLoss(np.array([5, 6])),
    FocalLoss(gamma=2, reduction="sum"), LinearLMFLoss(16, [5, 6, 7], reduction="mean"),
]
schedule = DeferredReweighting(criterion, Counter(labels), epoch=3)


def step(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    schedule(0)
    loss: Tensor = criterion(model(images), target, normalizer=global_normalizer(target, criterion))
    return loss + lmf_loss(images, target, margins=ldam_margins(counts), reduction="sum") + linear_lmf_loss(
        images, torch.ones(3, 4), target, reduction="mean"
    )


def weights(loss: LMFLoss) -> Tensor:
    assert loss.ldam_weight is not None
    loss.set_weight(loss.ldam_weight * 2)
    return loss.ldam_weight
"""

BAD = """
from lmf_kernels import FocalLoss, LDAMLoss, LinearLMFLoss, LMFLoss, linear_lmf_loss, lmf_loss
import torch

x, y = torch.randn(2, 3), torch.tensor([0, 1])
LMFLoss([1, 2], reduction="avg")
LDAMLoss([1, 2], reduction="avg")
FocalLoss(reduction="avg")
LinearLMFLoss(3, [1, 2], reduction="avg")
lmf_loss(x, y, reduction="avg")
linear_lmf_loss(x, x, y, reduction="avg")
"""


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")

    def check(code):
        (folder / "script.py").write_text(code)
        command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), "script.py"]
        root = str(Path(lmf_kernels.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": root, "MYPYPATH": ""}
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert run.returncode in (0, 1) and not run.stderr, run.stderr
        return run.stdout.splitlines()

    return check


def test_a_user_s_script_passes_strictly(mypy):
    assert mypy(GOOD) == ["Success: no issues found in 1 source file"]


def test_an_unknown_reduction_is_seen(mypy):
    found = mypy(BAD)
    for line in range(6, 12):
        assert any(f"script.py:{line}: error" in text and "avg" in text for text in found), (line, found)
