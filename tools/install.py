"""Installs a requirements file, or this package (`.`), into the running environment, as `make` does.

    python tools/install.py benchmarks/training/requirements.txt
    python tools/install.py .

An environment that make made gets the pinned versions, and the package by reference to the clone. One that was there
before keeps what it has, whatever its version: only what it lacks is installed, never another torch, and the package as
a copy, since its kernels in the clone would be those of one environment's torch.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

OWN = Path(sys.prefix, "made-for-lmf_kernels").exists()


def requirements(file: Path) -> Iterator[str]:
    """The lines of a requirements file and of those that it names, without comments."""
    for line in file.read_text().splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line.startswith("--requirement "):
            yield from requirements(file.parent / line.split()[1])
        elif line:
            yield line


def is_installed(requirement: str) -> bool:
    try:
        importlib.metadata.version(re.match(r"[\w.-]+", requirement)[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def main() -> None:
    (what,) = sys.argv[1:]
    if what == ".":
        pip("--no-build-isolation", "--no-deps", *(["--editable", "."] if OWN else ["--force-reinstall", "."]))
    elif OWN:
        pip("--requirement", what)
    elif lacking := [line for line in requirements(Path(what)) if not is_installed(line)]:
        print("installing what the environment lacks:", *lacking, flush=True)
        lacking = [re.sub(r"==[\w.]+", "", line) for line in lacking]  # the versions that fit what is there
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
            kept.writelines(f"{d.name}=={d.version}\n" for d in importlib.metadata.distributions() if d.name)
            kept.flush()
            pip("--constraint", kept.name, *lacking)


if __name__ == "__main__":
    main()
