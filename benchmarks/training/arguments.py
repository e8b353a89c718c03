"""What the command lines share: a parser of dataclasses, the numbers that it takes, and how mistakes end."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import simple_parsing

from .errors import UserError
from .ranks import leave

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
INTERRUPTED = 130  # the shell's exit code for Ctrl-C


class Parser(simple_parsing.ArgumentParser):
    """Options are the fields of dataclasses: ``max_m`` is ``--max-m``; mistakes are UserErrors."""

    def __init__(self, **keywords: Any) -> None:
        dashes = simple_parsing.DashVariant.DASH
        super().__init__(allow_abbrev=False, add_option_string_dash_variants=dashes, **keywords)

    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage as well."""
        raise UserError(message)


def exit_code(program: str, run: Callable[[], int]) -> int:
    """What ``run`` returns; 2 and one line for a mistake of the user."""
    try:
        return run()
    except UserError as error:
        print(f"{program}: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        leave()


def option(default: Any, help: str, **keywords: Any) -> Any:
    """A field of a dataclass of options; ``compare=False`` for what does not change the results."""
    if "type" in keywords:
        keywords.setdefault("metavar", "N")
    return simple_parsing.field(default=default, help=help, **keywords)


def several(default: tuple[str, ...], help: str, **keywords: Any) -> Any:
    """A field that takes one or more values."""
    return option(default, help, type=str, nargs="+", required=False, metavar=None, **keywords)


def switch(default: bool, help: str, **keywords: Any) -> Any:
    """A field that is ``--name`` or ``--no-name``."""
    return simple_parsing.flag(default=default, negative_prefix="--no-", help=help, **keywords)


def _whole(smallest: int, text: str) -> int:
    if not text.lstrip("-").isdigit() or int(text) < smallest:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {smallest}, got {text!r}")
    return int(text)


positive = partial(_whole, 1)
natural = partial(_whole, 0)


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
