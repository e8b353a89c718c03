"""TOML files of options: the same names as on the command line, a table for each loss."""

import argparse
from pathlib import Path
from typing import Any

from .errors import UserError
from .toml import read_toml


def config_arguments(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The file as command-line arguments: ``[lmf] s = 10`` is ``--lmf-s 10``."""
    options = read_toml(path, "--config ")
    known = {option for action in parser._actions for option in action.option_strings}
    arguments = []
    for flag, value in _flat(options, "-").items():
        if flag not in known:
            raise UserError(f"--config {path}: there is no option {flag}")
        arguments += _argument(flag, value)
    return arguments


def _flat(options: dict[str, Any], prefix: str) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    for name, value in options.items():
        flag = f"{prefix}-{name.replace('_', '-')}"
        flags |= _flat(value, flag) if isinstance(value, dict) else {flag: value}
    return flags


def _argument(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
