"""Builds the native extension lmf_kernels._C; everything else about the package is in pyproject.toml.

What is built, and the environment variables that choose it, are those of lmf_kernels/_build. That folder is imported by
its path: the package itself needs torch, which a build need not have.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import setup

BUILD = Path(__file__).parent / "lmf_kernels" / "_build"
spec = importlib.util.spec_from_file_location("lmf_build", BUILD / "__init__.py")
sys.modules["lmf_build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["lmf_build"])

from lmf_build.extension import setup_arguments  # noqa: E402

setup(**setup_arguments())
