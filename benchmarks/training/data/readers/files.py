"""What the readers of published datasets share: their folder, their CSV files, their images."""

import csv
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}


def data_folder(name: str, argument: str) -> Path:
    """The folder of ``--data NAME:PATH``."""
    if not argument:
        raise UserError(f"--data {name} needs a path: {name}:PATH")
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise UserError(f"--data {name}:{argument}: there is no such folder")
    return root


def read_rows(root: Path, file_name: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of ``file_name`` anywhere below ``root``; all ``columns`` must be there."""
    path = _find_file(root, file_name)
    if path is None:
        raise UserError(f"{root}: there is no {file_name} in it")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    missing = [column for column in columns if column not in (reader.fieldnames or [])]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}, expected the columns {', '.join(columns)}")
    if not rows:
        raise UserError(f"{path} has no rows")
    if any(row[column] is None for row in rows for column in columns):
        raise UserError(f"{path} has a row with too few columns")
    return rows


def has_file(root: Path, file_name: str) -> bool:
    """Whether ``file_name`` is anywhere below ``root``."""
    return _find_file(root, file_name) is not None


def find_images(root: Path, stems: Sequence[str]) -> list[Path]:
    """The image file of each stem, in whatever folders below ``root`` they are."""
    files = {path.stem: path for path in sorted(root.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES}
    missing = [stem for stem in stems if stem not in files]
    if missing:
        raise UserError(
            f"{root}: {len(missing)} of {len(stems)} images are missing, the first is {missing[0]} (.jpg or .png)"
        )
    return [files[stem] for stem in stems]


def _find_file(root: Path, file_name: str) -> Path | None:
    return next(iter(sorted(root.rglob(file_name))), None)
