"""A training step of a linear classifier of many classes on synthetic data: what the loss takes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmf_kernels import LMFLoss

from .arguments import Parser, option, positive
from .ranks import usable_device
from .report.text import aligned
from .timing import LossClock


@dataclass(frozen=True)
class Sizes:
    """How large the classifier is, and how often its step is timed."""

    device: str = option("cpu", "cpu, cuda, cuda:1, ...")
    features: int = option(512, "numbers that the classifier reads", type=positive)
    classes: int = option(20_000, "logits that it makes", type=positive)
    batch: int = option(1024, "samples of a step", type=positive)
    rounds: int = option(9, "steps of each loss", type=positive)


class Time(NamedTuple):
    """Milliseconds of a step and of its loss forward and backward: medians."""

    step: float
    loss: float


def measure(device: torch.device, features: int, classes: int, batch: int, rounds: int) -> dict[str, Time]:
    """Cross-entropy, fused and eager LMF, one after the other in each round."""
    inputs = torch.randn(batch, features, device=device)
    target = torch.randint(0, classes, (batch,), device=device)
    counts = torch.logspace(3, 0, classes).ceil()
    losses = {
        "cross_entropy": F.cross_entropy,
        "lmf fused": LMFLoss(counts).to(device),
        "lmf eager": LMFLoss(counts, backend="reference").to(device),
    }
    model = nn.Linear(features, classes, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = {name: LossClock(device) for name in losses}
    parts = {name: LossClock(device) for name in losses}

    def train_step(name: str, step: LossClock, part: LossClock) -> None:
        with step.step():
            optimizer.zero_grad(set_to_none=True)
            logits = model(inputs)
            leaf = logits.detach().requires_grad_()  # cuts the graph, so that the loss alone can be timed
            with part.step():
                losses[name](leaf, target).backward()
            assert isinstance(leaf.grad, Tensor)
            logits.backward(leaf.grad)
            optimizer.step()

    for name in losses:
        for _ in range(2):  # loads and compiles
            train_step(name, LossClock(device), LossClock(device))
    for _ in range(rounds):
        for name in losses:
            train_step(name, steps[name], parts[name])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for clock in (*steps.values(), *parts.values()):
        clock.collect()
    return {name: Time(steps[name].median(), parts[name].median()) for name in losses}


def table(times: dict[str, Time]) -> str:
    """The times as text, with the fused loss's gain for the whole step."""
    rows = [["Loss", "step ms", "loss ms", "share of step"]]
    rows += [[name, f"{t.step:.1f}", f"{t.loss:.1f}", f"{t.loss / t.step:.0%}"] for name, t in times.items()]
    fused, eager, plain = (times[name].step for name in ("lmf fused", "lmf eager", "cross_entropy"))
    gain = (
        f"Whole step with fused LMF: {eager / fused:.2f}x as fast as with eager LMF, {plain / fused:.2f}x cross-entropy"
    )
    return f"{aligned(rows)}\n{gain}"


def main(arguments: Sequence[str]) -> int:
    """``train.py many-classes``: print the table."""
    parser = Parser(prog="train.py many-classes", description=__doc__)
    parser.add_arguments(Sizes, "sizes")
    sizes: Sizes = parser.parse_args(arguments).sizes
    device = usable_device(sizes.device)
    print(f"Linear classifier {sizes.features} -> {sizes.classes}, batch {sizes.batch}, {sizes.rounds} rounds")
    print(table(measure(device, sizes.features, sizes.classes, sizes.batch, sizes.rounds)))
    return 0
