"""Loads the native extension, or finds out why it is not there."""

import importlib
from pathlib import Path
from typing import Any

import torch

from ._build import record
from ._versions import release

BUILD = "python -m lmf_kernels build"


built = record.read(Path(__file__).parent)


def _load() -> tuple[Any, str | None]:
    """(the extension, None) or (None, why it cannot be used and what to do)."""
    other = f"it was built for torch {built.torch}, and this is torch {torch.__version__}; rebuild it: {BUILD}"
    if built.torch and release(built.torch) != release(torch.__version__):
        return None, other  # before it is loaded: what another torch was compiled for may load, and crash
    try:
        # By name: `from . import _C` would hide a missing file behind a "partially initialized module".
        return importlib.import_module("lmf_kernels._C"), None
    except ModuleNotFoundError as error:
        if not built.why_not:
            return None, f"{error}; build it: {BUILD}"
        return None, f"it was not built when lmf_kernels was installed: {built.why_not}; then build it: {BUILD}"
    except ImportError as error:
        return None, other if built.torch not in ("", torch.__version__) else f"{error}; rebuild it: {BUILD}"


_C, native_problem = _load()
