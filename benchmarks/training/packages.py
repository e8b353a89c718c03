"""Packages that only some options need: `make train` does without them."""

import importlib
from types import ModuleType

from .errors import UserError


def needed(module: str, what: str) -> ModuleType:
    """The imported module; raises UserError that says what needs its package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        distribution = module.partition(".")[0].replace("_", "-")
        raise UserError(f"{what} needs the package {distribution}: pip install {distribution}") from error
