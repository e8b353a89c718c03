"""Batches of one part of the data, from memory or from files, in an order that (seed, epoch) fixes."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from ..ranks import Ranks
from .images import ImageFiles

Batch = tuple[torch.Tensor, torch.Tensor]  # images (n, c, h, w) in [0, 1], labels (n,)


class Order:
    """A batch sampler: each epoch has its own random order, or the stored order when ``seed`` is None.

    With several processes each takes its share of every batch, so that the batches are those of one process.
    """

    def __init__(self, samples: int, batch_size: int, seed: int | None, ranks: Ranks = Ranks()) -> None:  # noqa: B008
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.ranks = ranks
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        shares = (batch[self.ranks.rank :: self.ranks.size].tolist() for batch in self._batches())
        return iter([share for share in shares if share])

    def _batches(self) -> list[torch.Tensor]:
        if self.seed is None:
            return list(torch.arange(self.samples).split(self.batch_size))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches = list(torch.randperm(self.samples, generator=generator).split(self.batch_size))
        # Gradients of equal shares average to the batch's gradient.
        batches[-1] = batches[-1][: len(batches[-1]) // self.ranks.size * self.ranks.size]
        if len(batches) > 1 and len(batches[-1]) <= self.ranks.size:
            batches.pop()  # batch normalisation cannot train on a single value per channel
        return batches

    def __len__(self) -> int:
        return sum(1 for _ in self)


class MemoryBatches:
    """Batches cut from tensors that stay on the device."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, order: Order, shape: tuple[int, int, int]) -> None:
        self.images = images  # (n, c, h, w), uint8 or float
        self.labels = labels  # (n,)
        self.order = order
        self.shape = shape  # (c, h, w) that the model reads

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.order:
            index = torch.tensor(batch, device=self.images.device)
            yield self._prepare(self.images[index]), self.labels[index]

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.shape[-2:] != self.shape[1:]:
            images = F.interpolate(images, self.shape[1:], mode="bilinear", antialias=True)
        return images.expand(-1, self.shape[0], -1, -1)  # grey to RGB where the model wants that


class FileBatches:
    """Batches decoded by worker processes, copied to the device."""

    def __init__(self, files: ImageFiles, order: Order, device: torch.device, workers: int) -> None:
        self.order = order
        self.device = device
        self.loader = DataLoader(
            files,
            batch_sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its own: it must not advance the model's random state
        )

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


Batches = MemoryBatches | FileBatches
