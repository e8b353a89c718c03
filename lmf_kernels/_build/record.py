"""The record of a build, beside the extension: what it was built for, or why there is none. pip hides what builds say."""

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = "_native.json"


class Record(NamedTuple):
    torch: str = ""  # version that the extension was compiled for; empty without one
    why_not: str = ""  # why there is no extension
    cuda: str = ""  # architectures of the CUDA kernels
    why_no_cuda: str = ""


def read(package: Path) -> Record:
    """The record in the package's folder; an empty one where there is none, or one of another version of this file."""
    try:
        fields: dict[str, Any] = json.loads((package / FILE).read_text())
        return Record(**fields)
    except (OSError, ValueError, TypeError):
        return Record()


def write(package: Path, record: Record) -> None:
    package.mkdir(parents=True, exist_ok=True)
    (package / FILE).write_text(json.dumps(record._asdict(), indent=1) + "\n")
