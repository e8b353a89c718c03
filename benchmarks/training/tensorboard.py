"""The curves for TensorBoard, under the official code's names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError
from .loop import History

TAGS = {
    "Loss/train": "train_loss",
    "Loss/val": "val_loss",
    "Acc/train": "train_accuracy",
    "Acc/val": "val_accuracy",
    "F1/train": "train_macro_f1",
    "F1/val": "val_macro_f1",
}


def check_tensorboard() -> None:
    """Raise UserError if the package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error


@contextmanager
def scalar_writer(folder: Path | None) -> Iterator[Callable[[History], None]]:
    """A function that writes the newest epoch of a history into ``folder``; without a folder it does nothing."""
    if folder is None:
        yield lambda history: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:

        def write(history: History) -> None:
            for tag, name in TAGS.items():
                values = getattr(history, name)
                writer.add_scalar(tag, values[-1], len(values))

        yield write
