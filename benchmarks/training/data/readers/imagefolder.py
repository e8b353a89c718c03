"""Folders of images, one per class: torchvision's ImageFolder layout."""

from itertools import chain
from pathlib import Path

import numpy as np

from ...errors import UserError
from ...packages import needed
from ..samples import PARTS, Samples
from .files import data_folder


def read_imagefolder(argument: str) -> Samples:
    """PATH/CLASS/*.jpg, split here; or PATH/{train,val,test}/CLASS/*.jpg, split already."""
    root = data_folder("imagefolder", argument)
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    if not folders:
        raise UserError(f"--data imagefolder:{argument}: no class folders in it, expected PATH/CLASS/IMAGE")
    if folders == set(PARTS):
        return _read_parts(root)
    classes, files, labels = _read_folder(root)
    return Samples(root.name, classes, labels, files)


def _read_parts(root: Path) -> Samples:
    classes, files, labels = zip(*(_read_folder(root / part) for part in PARTS), strict=True)
    for part, names in zip(PARTS, classes, strict=True):
        if names != classes[0]:
            raise UserError(
                f"{root}: the class folders of {part} ({', '.join(names)}) are not those of train "
                f"({', '.join(classes[0])})"
            )
    parts = np.repeat(np.arange(len(PARTS)), [len(part) for part in files])
    return Samples(root.name, classes[0], np.concatenate(labels), list(chain.from_iterable(files)), parts)


def _read_folder(root: Path) -> tuple[tuple[str, ...], list[Path], np.ndarray]:
    try:
        folder = needed("torchvision.datasets", "--data imagefolder").ImageFolder(root, allow_empty=True)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{root}: {error}") from error
    labels = np.array(folder.targets, dtype=np.int64)
    for label, class_name in enumerate(folder.classes):
        if not (labels == label).any():
            raise UserError(f"class folder {root / class_name} has no images")
    return tuple(folder.classes), [Path(path) for path, _ in folder.samples], labels
