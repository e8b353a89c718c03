"""`python -m lmf_kernels build`: compiles the native extension into the installed package, for the torch that runs."""

import contextlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def build() -> str:
    """Builds and replaces the extension; returns the line that says what is there now.

    A build that fails leaves the installation as it was.

    Raises:
        SystemExit: it cannot be built, with one line that says why.
    """
    try:
        from setuptools import Distribution
    except ImportError:
        sys.exit("lmf_kernels: the build needs setuptools (pip install setuptools ninja)")
    from . import record
    from .extension import FILE, say, setup_arguments

    sources = _sources()
    if not os.access(PACKAGE, os.W_OK):
        sys.exit(f"lmf_kernels: {PACKAGE} is not writable: run as the user who installed lmf_kernels")
    os.environ["LMF_BUILD_NATIVE"] = "1"  # asked for by name: a failure is an error here
    with tempfile.TemporaryDirectory() as scratch, _working_in(sources):
        build_ext = Distribution({"name": "lmf_kernels", **setup_arguments()}).get_command_obj("build_ext")
        build_ext.build_lib, build_ext.build_temp = f"{scratch}/lib", f"{scratch}/objects"
        build_ext.ensure_finalized()
        say("compiling, which takes a minute or two")
        log = Path(scratch, "log")
        try:
            with _output_to(log):
                build_ext.run()
        except Exception as error:
            print(log.read_text(errors="replace"), file=sys.stderr)
            sys.exit(f"lmf_kernels: the build failed, and nothing was changed: {str(error).splitlines()[0]}")
        built = Path(scratch, "lib", "lmf_kernels")
        for file in (FILE, record.FILE):  # the copy may cross file systems; the renaming leaves nothing half-written
            shutil.copy(built / file, PACKAGE / f".{file}.new")
            os.replace(PACKAGE / f".{file}.new", PACKAGE / file)
    _list_as_installed(FILE, record.FILE)
    found = record.read(PACKAGE)
    return f"built {PACKAGE / FILE} for torch {found.torch}, " + (
        f"CUDA kernels for {found.cuda}" if found.cuda else "without CUDA kernels"
    )


def _sources() -> Path:
    """The folder of csrc/: within an installed package, beside it in a clone."""
    for folder in (PACKAGE / "_build", PACKAGE.parent):
        if (folder / "csrc" / "lmf.cpp").exists():
            return folder
    sys.exit(f"lmf_kernels: the C++ sources are neither in {PACKAGE / '_build'} nor in {PACKAGE.parent}")


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """The sources' names are relative, and objects are put into folders of those names."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Takes what compilers print, too."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(stream) for stream in (1, 2)]
    with open(file, "wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, saved in zip((1, 2), before, strict=True):
            os.dup2(saved, stream)
            os.close(saved)


def _list_as_installed(*files: str) -> None:
    """So that `pip uninstall` takes them away; a clone, or what no installer wrote, has no such list."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
        distribution = importlib.metadata.distribution("lmf_kernels")
        listed = {str(file) for file in distribution.files or ()}
        if Path(str(distribution.locate_file("lmf_kernels"))).resolve() != PACKAGE or not listed:
            return
        (record,) = (file for file in distribution.files or () if file.match("*.dist-info/RECORD"))
        with open(str(record.locate()), "a") as lines:
            lines.writelines(f"lmf_kernels/{file},,\n" for file in files if f"lmf_kernels/{file}" not in listed)
