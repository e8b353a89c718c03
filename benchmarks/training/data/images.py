"""Image files: which of them can be read, and a torch dataset over them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..packages import needed


class ImageFiles(Dataset[tuple[torch.Tensor, int]]):
    """RGB images of one size in [0, 1], (3, size, size), with their labels."""

    def __init__(self, files: Sequence[Path], labels: np.ndarray, size: int) -> None:
        v2 = needed("torchvision.transforms.v2", "training on image files")
        self.files = files
        self.labels = labels
        # The official code's preparation: a plain resize, no cropping, no normalisation.
        self.prepare = v2.Compose(
            [v2.ToImage(), v2.Resize((size, size), antialias=True), v2.ToDtype(torch.float32, scale=True)]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[index]) as image:
            return self.prepare(image.convert("RGB")), int(self.labels[index])


def unreadable(files: Sequence[Path]) -> dict[int, str]:
    """Decode every file once; the indices of those that cannot be, with the reason."""
    with ThreadPoolExecutor() as pool:  # PIL decodes without the interpreter's lock
        reasons = tqdm(
            pool.map(_why_unreadable, files),
            "checking images",
            len(files),
            leave=False,
            disable=None,
            unit="img",
        )
        return {index: reason for index, reason in enumerate(reasons) if reason}


def _why_unreadable(file: Path) -> str | None:
    try:
        with Image.open(file) as image:
            image.draft("RGB", (64, 64))  # a JPEG is read to its end, but decoded small
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{type(error).__name__}: {error}"
    return None
