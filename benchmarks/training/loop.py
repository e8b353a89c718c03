"""The training loop: epochs, validation, the best checkpoint, the test.

By hand, because of the step: the losses are measured on the logits that the model gives, which Lightning Fabric and
Accelerate convert to float32 under mixed precision, and the second half of backward starts at the gradient of the
logits, which Fabric refuses where gradients are scaled.
"""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .arguments import option, switch
from .data.batches import Batches
from .metrics import Metrics, Tally
from .models import Protocol
from .ranks import Ranks
from .timing import LossClock

PROGRESS = ("best_epoch", "best_weights", "train_seconds", "images_seen")  # of the Trainer, as they are
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Speed:
    """What makes training faster on a GPU. Under torchrun the processes share every batch (gloo or NCCL)."""

    amp: str | None = option(None, "mixed precision; None: float32", type=str, nargs=None, metavar=None, choices=AMP)
    channels_last: bool = switch(False, "store images as NHWC")
    compile: bool = switch(False, "torch.compile the model")


@dataclass
class History:
    """One number per epoch."""

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)  # while it trains: the model changes from step to step
    train_macro_f1: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    val_macro_f1: list[float] = field(default_factory=list)

    def add(self, part: str, loss: float, metrics: Metrics) -> None:
        """An epoch of "train" or "val"."""
        for name, value in {"loss": loss, "accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1}.items():
            getattr(self, f"{part}_{name}").append(value)


@dataclass(frozen=True)
class Outcome:
    """What a finished training is worth: the test metrics of the epoch with the best validation macro F1."""

    test: Metrics
    best_epoch: int  # counted from 1
    best_val_macro_f1: float
    images_per_second: float  # of the training part of the loop: loading, forward, loss, backward, optimiser
    loss_ms: float  # loss forward and backward to the logits, median step
    loss_share: float  # of the training time
    history: History


class Trainer:
    """Trains one model with one loss."""

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        protocol: Protocol,
        device: torch.device,
        num_classes: int,
        speed: Speed | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.speed = speed or Speed()
        self.ranks = ranks or Ranks()
        self.layout = torch.channels_last if self.speed.channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=self.layout)
        self.criterion = criterion.to(device)
        self.protocol = protocol
        self.device = device
        self.num_classes = num_classes
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=protocol.lr, weight_decay=protocol.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            self.optimizer, step_size=protocol.lr_step, gamma=protocol.lr_gamma
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.speed.amp == "fp16")
        self.forward = self._forward_of(self.model)
        self.clock = LossClock(device)
        self.history = History()
        self.best_epoch = 0
        self.best_weights: dict[str, torch.Tensor] = {}
        self.train_seconds = 0.0
        self.images_seen = 0

    def _forward_of(self, model: nn.Module) -> Callable[..., Any]:
        if self.ranks.size > 1:
            model = DistributedDataParallel(model)
        return torch.compile(model) if self.speed.compile else model

    def run(self, train: Batches, val: Batches, test: Batches, on_epoch: Callable[["Trainer"], None]) -> Outcome:
        """The epochs that are still to do, then the test with the weights that were best on the validation part."""
        while len(self.history.train_loss) < self.protocol.epochs:
            self._train_epoch(train)
            self._validate(val)
            on_epoch(self)
        self.model.load_state_dict(self.best_weights)
        test_metrics, _ = self.evaluate(test)
        return Outcome(
            test=test_metrics,
            best_epoch=self.best_epoch,
            best_val_macro_f1=max(self.history.val_macro_f1),
            images_per_second=self.images_seen / self.train_seconds,
            loss_ms=self.clock.median(),
            loss_share=sum(self.clock.milliseconds) / 1e3 / self.train_seconds,
            history=self.history,
        )

    def _train_epoch(self, batches: Batches) -> None:
        self.model.train()
        batches.order.epoch = len(self.history.train_loss)
        tally = self._tally()
        start = time.perf_counter()
        for images, labels in batches:
            tally.add(*self._step(images, labels), labels)
        self.scheduler.step()
        loss, samples = tally.mean_loss()  # waits for the device
        self.train_seconds += time.perf_counter() - start
        self.images_seen += samples
        self.clock.collect()
        self.history.add("train", loss, tally.metrics())

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step; returns the loss and the logits before it."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.forward(images.contiguous(memory_format=self.layout))
        leaf = logits.detach().requires_grad_()  # cuts the graph, so that the loss alone can be timed
        with self.clock.step():
            with self._autocast():
                loss = self.criterion(leaf, labels)
            self.scaler.scale(loss).backward()
        logits.backward(leaf.grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), leaf.detach()

    def _validate(self, batches: Batches) -> None:
        metrics, loss = self.evaluate(batches)
        if metrics.macro_f1 > max(self.history.val_macro_f1, default=-1.0):
            self.best_epoch = len(self.history.train_loss)
            self.best_weights = copy.deepcopy(self.model.state_dict())
        self.history.add("val", loss, metrics)

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> tuple[Metrics, float]:
        """The metrics and the mean loss of one part."""
        self.model.eval()
        self.ranks.share_buffers(self.model)
        tally = self._tally()
        for images, labels in batches:
            with self._autocast():
                logits = self.model(images.contiguous(memory_format=self.layout))
                loss = self.criterion(logits, labels)
            tally.add(loss, logits, labels)
        return tally.metrics(), tally.mean_loss()[0]

    def _tally(self) -> Tally:
        return Tally(self.num_classes, self.device, self.ranks)

    def _autocast(self) -> AbstractContextManager[Any]:
        amp = self.speed.amp
        return torch.autocast(self.device.type, dtype=AMP[amp]) if amp else nullcontext()

    def state(self) -> dict[str, Any]:
        """Everything that continuing after a kill needs; the batch order follows from the epoch."""
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            **{name: getattr(self, name) for name in PROGRESS},
            "history": asdict(self.history),
            "loss_milliseconds": self.clock.milliseconds,
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.history = History(**state["history"])
        self.clock.milliseconds = state["loss_milliseconds"]
        torch.set_rng_state(state["random_state"].cpu())
        if state["cuda_random_state"] is not None:
            torch.cuda.set_rng_state(state["cuda_random_state"].cpu(), self.device)

    def _parts(self) -> dict[str, Any]:
        """What has a state_dict."""
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
