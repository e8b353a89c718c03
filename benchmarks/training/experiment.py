"""The comparison: every loss with every seed on the same splits, initial weights and batch orders."""

import time
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoint, gradcam
from .data.batches import Batch, Batches, FileBatches, MemoryBatches, Order
from .data.images import ImageFiles, unreadable
from .data.readers import read
from .data.samples import Samples
from .data.split import Split, split_samples
from .errors import UserError
from .loop import Outcome, Trainer
from .losses import LABELS, build_loss
from .models import PAPER_IMAGE_SIZE, build_model, model_of
from .options import Config
from .ranks import Ranks, join, usable_device
from .record import Record
from .report.paper_numbers import paper_numbers
from .tensorboard import check_tensorboard, scalar_writer

GALLERY = 3  # samples with Grad-CAM overlays
EVALUATION_BATCHES = 4  # times as large as in training, since no gradients are kept


class Experiment:
    """The data and the settings that all trainings share. Making one checks everything that the user gave."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.ranks, self.device = join(usable_device(config.device))
        torch.set_num_threads(config.threads)
        self.samples = _readable(read(config.data), config.strict)
        self.samples.check()
        self.image_shape = _image_shape(self.samples, config.model, config.protocol.image_size)
        self.train_counts = self.counts(self.split(config.seeds[0]).train)
        if config.grouped:  # where a seed can leave a class out of a part
            for seed in config.seeds:
                self.split(seed)
        for loss in config.losses:
            build_loss(loss, self.train_counts, config.loss_options)
        self._model()
        if config.tensorboard:
            check_tensorboard()
        if config.grad_cam:
            gradcam.check_gradcam(config.model)
        self.paper = paper_numbers(config.data, config.model, self.samples.class_names)
        self.finished = checkpoint.finished_records(config) if config.resume else []

    def runs(self, quiet: bool = False) -> Iterator[Record]:
        """Train what is not finished; seeds are the outer loop: an early stop leaves whole comparisons."""
        config = self.config
        finished = {(record.loss, record.seed) for record in self.finished}
        missing = [(seed, loss) for seed in config.seeds for loss in config.losses if (loss, seed) not in finished]
        total = len(missing) * config.protocol.epochs
        quiet = quiet or not self.ranks.first
        with tqdm(total=total, unit="epoch", disable=quiet or None, dynamic_ncols=True) as bar:
            for seed, loss in missing:
                bar.set_description(f"{LABELS[loss]}, seed {seed}")
                record = Record(loss, seed, self._train(loss, seed, bar))
                yield record
                if not quiet:  # by now it is on disk
                    bar.write(record.summary())

    def _train(self, loss: str, seed: int, bar: tqdm) -> Outcome:
        split = self.split(seed)
        trainer = self.trainer(loss, seed, split)
        bar.update(len(trainer.history.train_loss))
        train = self.batches(split.train, seed)
        val, test = self.batches(split.val, None), self.batches(split.test, None)
        scalars = self.config.out / "tensorboard" / f"{loss}-seed{seed}"
        last_checkpoint = time.monotonic()
        with scalar_writer(scalars if self.config.tensorboard and self.ranks.first else None) as write_scalars:

            def on_epoch(trainer: Trainer) -> None:
                nonlocal last_checkpoint
                history = trainer.history
                bar.update()
                bar.set_postfix(loss=f"{history.train_loss[-1]:.3g}", val_f1=f"{history.val_macro_f1[-1]:.3f}")
                write_scalars(history)
                if self.ranks.first and time.monotonic() - last_checkpoint >= self.config.checkpoint_seconds:
                    checkpoint.save(self.config, loss, seed, trainer)
                    last_checkpoint = time.monotonic()

            outcome = trainer.run(train, val, test, on_epoch)
        if self.config.grad_cam and self.ranks.first and seed == self.config.seeds[0]:
            images, _ = self._gallery_batch()
            gradcam.save(self.config.out, loss, *gradcam.overlays(trainer.model, self.config.model, images))
        return outcome

    def gallery(self) -> tuple[np.ndarray, list[str]]:
        """The test samples of the overlays, (n, h, w, 3), and their class names."""
        images, labels = self._gallery_batch()
        return gradcam.as_rgb(images), self._names(labels)

    def overlays(self) -> dict[str, tuple[np.ndarray, list[str]]]:
        """For each loss the first seed's overlays of the gallery and the names of the predicted classes."""
        return {
            loss: (pictures, self._names(predicted))
            for loss, (pictures, predicted) in gradcam.saved(self.config.out).items()
        }

    def _names(self, labels: torch.Tensor | np.ndarray) -> list[str]:
        return [self.samples.class_names[label] for label in labels.tolist()]

    def _gallery_batch(self) -> Batch:
        """The first test sample of each of the rarest classes."""
        test = self.split(self.config.seeds[0]).test
        rarest = np.argsort(self.train_counts, kind="stable")[:GALLERY]
        chosen = [test[np.flatnonzero(self.samples.labels[test] == label)[0]] for label in rarest]
        return next(iter(self.batches(np.array(chosen), None, Ranks())))  # whole, also under torchrun

    def trainer(self, loss: str, seed: int, split: Split) -> Trainer:
        """A new trainer, or one that continues from a checkpoint."""
        config = self.config
        torch.manual_seed(seed)  # the same initial weights for every loss
        trainer = Trainer(
            self._model(),
            build_loss(loss, self.counts(split.train), config.loss_options),
            config.protocol,
            self.device,
            len(self.samples.class_names),
            config.speed,
            self.ranks,
        )
        if config.resume:
            checkpoint.restore(config, loss, seed, trainer)
        return trainer

    def split(self, seed: int) -> Split:
        """The parts with this seed."""
        return split_samples(self.samples, seed, self.config.grouped)

    def counts(self, indices: np.ndarray) -> list[int]:
        """(C,) images of each class among ``indices``."""
        return np.bincount(self.samples.labels[indices], minlength=len(self.samples.class_names)).tolist()

    def _model(self) -> torch.nn.Module:
        config = self.config
        return build_model(config.model, self.image_shape, len(self.samples.class_names), config.weights, config.head)

    def batches(self, indices: np.ndarray, order_seed: int | None, ranks: Ranks | None = None) -> Batches:
        """Batches for training in the order of a seed, or for evaluation; this process's share of them."""
        config, part = self.config, self.samples.select(indices)
        batch_size = config.protocol.batch_size * (EVALUATION_BATCHES if order_seed is None else 1)
        order = Order(len(indices), batch_size, order_seed, ranks or self.ranks)
        if isinstance(part.images, list):
            files = ImageFiles(part.images, part.labels, self.image_shape[1])
            return FileBatches(files, order, self.device, config.workers)
        return MemoryBatches(
            part.images.to(self.device), torch.from_numpy(part.labels).to(self.device), order, self.image_shape
        )


def _image_shape(samples: Samples, model: str, size: int | None) -> tuple[int, int, int]:
    """(channels, height, width) of what the model reads."""
    if isinstance(samples.images, list):
        size = size or PAPER_IMAGE_SIZE
        return 3, size, size
    channels, height, width = samples.images.shape[1:]
    if height == 1 and model != "mlp":
        raise UserError(f"--model {model} reads images, but {samples.name} is a table; use --model mlp")
    if model == "mlp" and size is None:
        return channels, height, width
    known = model_of(model)
    shape = (channels if known.small else 3, size or height, size or width)
    if min(shape[1:]) < known.smallest_image:
        raise UserError(
            f"images of {shape[1]}x{shape[2]} are too small for {model}, expected at least {known.smallest_image}; "
            "see --image-size"
        )
    return shape


def _readable(samples: Samples, strict: bool) -> Samples:
    if not isinstance(samples.images, list):
        return samples
    bad = unreadable(samples.images)
    if bad and strict:
        first = next(iter(bad))
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise UserError(
            f"image {samples.images[first]} cannot be read{more}: {bad[first]}; --no-strict leaves such images out"
        )
    if bad:
        print(f"left out {len(bad)} of {len(samples.images)} images that cannot be read", flush=True)
    return samples.select(np.setdiff1d(np.arange(len(samples.images)), list(bad)))
