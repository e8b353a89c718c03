"""The versions of torch and Triton that the package is for; pyproject.toml and docs/support.md say the same."""

import importlib.util
import re
import warnings
from pathlib import Path

import torch

__version__ = "0.1.0"
TORCH, TORCH_TESTED = (2, 8), (2, 15)  # from, and the newest that was tested
TORCH_POSSIBLE = (2, 6)  # CPU only, untested
TRITON = (3, 4)


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _check_torch() -> None:
    """Raises ImportError for a torch that is too old; warns where it may work and was not tested."""
    found = release(torch.__version__)
    needs = f"lmf_kernels needs torch >= {text(TORCH)} (tested up to {text(TORCH_TESTED)}), found {torch.__version__}"
    if found < TORCH_POSSIBLE:
        raise ImportError(f"{needs}: pip install 'torch>={text(TORCH)}'")
    if found < TORCH:
        warnings.warn(f"{needs}: the CPU kernels may work, nothing else is promised", stacklevel=4)


_check_torch()


def triton_version() -> str | None:
    """Triton's version, None without Triton; read from its file, since importing it takes most of a second."""
    try:
        spec = importlib.util.find_spec("triton")
        if spec is None or spec.origin is None:
            return None
        found = re.search(r"^__version__ = ['\"]([^'\"]+)", Path(spec.origin).read_text(), re.MULTILINE)
    except (ImportError, OSError):  # also an import hook that refuses it
        return None
    return found[1] if found else "of unknown version"


def triton_problem() -> str | None:
    """Why the Triton kernels cannot be used, in a few words; None if they can."""
    found = triton_version()
    if found is None:
        return "the package triton is missing (pip install triton)"
    if release(found) < TRITON:
        return (
            f"triton {found} is too old: the kernels need triton >= {text(TRITON)}, which torch >= {text(TORCH)} brings"
        )
    return None
