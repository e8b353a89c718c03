"""Why the scale matters: which of LMF's two terms drives the training, epoch by epoch."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from lmf_kernels import ldam_margins, lmf_loss

from ..data.batches import Batches
from ..experiment import Experiment
from ..loop import Trainer
from ..report.plots import save
from .grid import SCALES


@dataclass(frozen=True)
class Terms:
    """One number per epoch, over the training part."""

    ldam_share: list[float]  # of the two terms' gradient norms with respect to the logits
    gap: list[float]  # median of z_y minus the largest other logit


def follow(experiment: Experiment) -> Terms:
    """Train LMF (alpha = beta = 1) and measure its terms after every epoch."""
    seed, s = experiment.config.seeds[0], experiment.config.loss_options.lmf.s
    split = experiment.split(seed)
    trainer = experiment.trainer("lmf", seed, split)
    train, whole = experiment.batches(split.train, seed), experiment.batches(split.train, None)
    val, test = experiment.batches(split.val, None), experiment.batches(split.test, None)
    margins = ldam_margins(experiment.counts(split.train))
    terms = Terms([], [])

    def measure(trainer: Trainer) -> None:
        logits, labels = _logits(trainer, whole)
        ldam = _gradient_norm(logits, labels, margins, s, alpha=1.0, beta=0.0)
        focal = _gradient_norm(logits, labels, margins, s, alpha=0.0, beta=1.0)
        terms.ldam_share.append(ldam / (ldam + focal))
        own = logits.gather(1, labels[:, None])[:, 0]
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        terms.gap.append((own - others).median().item())

    trainer.run(train, val, test, measure)
    return terms


@torch.no_grad()
def _logits(trainer: Trainer, batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [(trainer.model(images), labels) for images, labels in batches]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def _gradient_norm(
    logits: torch.Tensor, labels: torch.Tensor, margins: torch.Tensor, s: float, alpha: float, beta: float
) -> float:
    """The mean over samples of the norm of the term's gradient with respect to the logits."""
    leaf = logits.detach().requires_grad_()
    loss = lmf_loss(leaf, labels, margins=margins, s=s, alpha=alpha, beta=beta, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.norm(dim=1).mean().item()


def plot_terms(curves: dict[float, Terms], path: Path) -> None:
    """The LDAM term's share of the gradient and the logit gap, against the epoch."""
    figure, (share_axes, gap_axes) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for s, color in zip(SCALES, ("#56B4E9", "#009E73", "#E69F00", "#D55E00"), strict=True):
        epochs = np.arange(1, len(curves[s].gap) + 1)
        share_axes.plot(epochs, curves[s].ldam_share, color=color, label=f"s = {s:g}")
        gap_axes.plot(epochs, curves[s].gap, color=color, label=f"s = {s:g}")
    share_axes.set(
        xlabel="epoch", ylabel="LDAM's share of the gradient", ylim=(0, 1.02), title="Which term drives the training"
    )
    gap_axes.set(
        xlabel="epoch", ylabel="median logit gap of training samples", yscale="log", title="How far the logits grow"
    )
    for axes in (share_axes, gap_axes):
        axes.grid(alpha=0.3)
    figure.legend(*gap_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, path, dpi=110)
