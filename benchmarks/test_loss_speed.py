"""Forward + backward of the LMF loss and its peers with pytest-benchmark, grouped by shape.

    pytest benchmarks/ --benchmark-only [--device cuda] [--backend native]

The focal losses of kornia and MONAI take part where those packages are installed; they have no LDAM term.
"""

import importlib
from functools import partial

import pytest
import torch
from measure import batch, check, contenders, step, synchronize

SHAPES = [(32, 8), (512, 8), (4096, 7), (20000, 23), (4096, 1000), (1024, 32000), (8, 5, 256, 256)]


def kornia_focal():
    return partial(importlib.import_module("kornia.losses").focal_loss, alpha=1.0, gamma=1.5, reduction="mean")


def monai_focal():
    loss = importlib.import_module("monai.losses").FocalLoss(gamma=1.5, use_softmax=True, to_onehot_y=True)
    return lambda logits, target: loss(logits, target.unsqueeze(1))


PEERS = {"kornia focal": kornia_focal, "monai focal": monai_focal}
NAMES = ["cross_entropy", "lmf fused", "lmf eager", "lmf compiled", *PEERS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_forward_backward(benchmark, shape, name, device, backend):
    benchmark.group = "x".join(map(str, shape))
    logits, target = batch(shape, torch.float32, device)
    if name in PEERS:
        try:
            loss = PEERS[name]()
        except ImportError as error:
            pytest.skip(f"{error.name} is not installed")
    else:
        loss = contenders(shape[1], device, backend=backend)[name]
    if name == "lmf fused":
        check(loss, logits, target)

    def run():
        step(loss, logits, target)
        synchronize(device)

    run()  # compiles, allocates
    benchmark(run)
