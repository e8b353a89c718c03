"""TOML files, which Python reads from 3.11 on."""

import importlib
from pathlib import Path
from typing import Any

from .errors import UserError


def read_toml(path: Path, what: str = "") -> dict[str, Any]:
    """The file's tables; errors begin with ``what`` and the path."""
    try:
        tomllib = importlib.import_module("tomllib")
    except ImportError as error:
        raise UserError(f"{what}{path} needs Python 3.11 or newer") from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{what}{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{what}{path} is not a TOML file: {error}") from error
