"""What the compiled CUDA kernels of the extension need: registers, stack and local memory, by cuobjdump."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

from lmf_kernels import _ops


def cuobjdump() -> Path | str | None:
    """The tool's path: CUDA toolkits have it, and so has Triton."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found


@functools.cache
def resources() -> dict[tuple[str, str], tuple[int, int, int]]:
    """(architecture, mangled kernel) -> registers a thread, stack and local bytes a thread."""
    command = [cuobjdump(), "-res-usage", _ops._C.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table, arch = {}, ""
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\w+)", line):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            table[arch, kernel] = tuple(map(int, match.groups()))
    return table
