"""TOML files, which Python reads from 3.11 on; before, the package tomli does."""

import sys
from pathlib import Path
from typing import Any

from .errors import UserError
from .packages import needed


def read_toml(path: Path, what: str = "") -> dict[str, Any]:
    """The file's tables; errors begin with ``what`` and the path."""
    tomllib = needed("tomllib" if sys.version_info >= (3, 11) else "tomli", f"{what}{path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{what}{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{what}{path} is not a TOML file: {error}") from error
