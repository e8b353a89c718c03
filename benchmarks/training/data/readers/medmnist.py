"""MedMNIST's two-dimensional single-label datasets, from a local .npz file or through the package."""

import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from ...errors import UserError
from ..samples import PARTS, Samples


def read_medmnist(argument: str) -> Samples:
    """``medmnist:dermamnist`` (downloaded once by the package) or ``medmnist:PATH/dermamnist.npz``."""
    if not argument:
        raise UserError("--data medmnist needs a name or a file: medmnist:dermamnist or medmnist:PATH.npz")
    path = Path(argument).expanduser()
    if path.suffix != ".npz":
        path = _download(argument)
    arrays = _load(path)
    labels = np.concatenate([arrays[f"{part}_labels"] for part in PARTS])  # (n, 1)
    images = np.concatenate([arrays[f"{part}_images"] for part in PARTS])  # (n, h, w) or (n, h, w, 3)
    if labels.ndim != 2 or labels.shape[1] != 1:
        raise UserError(f"{path}: its labels have shape {labels.shape}, but only one label per image is supported")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise UserError(f"{path}: its images have shape {images.shape}, but only two-dimensional ones are supported")
    pixels = torch.from_numpy(images.astype(np.uint8))
    return Samples(
        name=path.stem,
        class_names=_class_names(path.stem, int(labels.max()) + 1),
        labels=labels[:, 0].astype(np.int64),
        images=pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous(),
        published_parts=np.repeat(np.arange(len(PARTS)), [len(arrays[f"{part}_labels"]) for part in PARTS]),
    )


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return {name: file[name] for part in PARTS for name in (f"{part}_images", f"{part}_labels")}
    except FileNotFoundError as error:
        raise UserError(f"--data medmnist:{path}: there is no such file") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a MedMNIST file: {error}") from error


def _download(name: str) -> Path:
    medmnist = _package()
    if medmnist is None:
        raise UserError(f"--data medmnist:{name} needs the package medmnist (pip install medmnist), or a .npz file")
    if name not in medmnist.INFO:
        raise UserError(f"--data medmnist:{name} is unknown, expected one of: {', '.join(medmnist.INFO)}")
    dataset_class = getattr(medmnist, medmnist.INFO[name]["python_class"])
    try:
        dataset = dataset_class(split="train", download=True)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--data medmnist:{name} could not be downloaded; if you have the file: --data medmnist:PATH/{name}.npz"
        ) from error
    return Path(dataset.root) / f"{name}.npz"


def _class_names(stem: str, num_classes: int) -> tuple[str, ...]:
    """The package's names where it knows the file, shortened to their first word or two; else the label numbers."""
    info = getattr(_package(), "INFO", {}).get(stem.partition("_")[0], {})
    names = info.get("label", {})
    return tuple(names.get(str(label), str(label)) for label in range(num_classes))


def _package() -> ModuleType | None:
    try:
        import medmnist
    except ImportError:
        return None
    return medmnist
