"""What a build makes, and what it leaves where it cannot: the record, one line, and an installation that works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lmf_kernels
from lmf_kernels import _native
from lmf_kernels._build import extension, record
from lmf_kernels._build.extension import NotBuilt, cuda_toolkit, find_compiler, wanted
from lmf_kernels._build.record import Record
from lmf_kernels._build.toolkit import NoToolkit

ROOT = Path(lmf_kernels.__file__).parents[1]
VARIABLES = ("LMF_BUILD_NATIVE", "LMF_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "LMF_SANITIZE", "CXX")
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the package in its clone")


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---- what is asked for ----------------------------------------------------------------------------------------------
def test_variables_are_0_or_1(monkeypatch):
    for value, meaning in (("", None), ("0", False), ("1", True)):
        monkeypatch.setenv("LMF_BUILD_CUDA", value)
        assert wanted("LMF_BUILD_CUDA") is meaning
    monkeypatch.setenv("LMF_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="LMF_BUILD_CUDA must be 0, 1 or unset, got 'yes'"):
        wanted("LMF_BUILD_CUDA")


class Toolkit:
    architectures = "8.0;9.0"


@pytest.fixture
def gpus(monkeypatch):
    """Capabilities of the GPUs that are visible to a torch with CUDA 13.0, whose toolkit is there."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index])
    monkeypatch.setattr(extension, "find_toolkit", lambda cuda: Toolkit())
    return found


def test_cuda_kernels_are_for_the_visible_gpus_or_asked_for(gpus, monkeypatch):
    with pytest.raises(NotBuilt, match=r"no GPU was visible during the build \(LMF_BUILD_CUDA=1"):
        cuda_toolkit()
    monkeypatch.setenv("LMF_BUILD_CUDA", "1")
    assert cuda_toolkit()[1] == "8.0;9.0"
    gpus += [(9, 0), (8, 9), (9, 0)]
    assert cuda_toolkit()[1] == "8.9;9.0"
    monkeypatch.delenv("LMF_BUILD_CUDA")
    assert cuda_toolkit()[1] == "8.9;9.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    assert cuda_toolkit()[1] == "10.0"
    gpus.clear()
    assert cuda_toolkit()[1] == "10.0"
    monkeypatch.setenv("LMF_BUILD_CUDA", "0")
    with pytest.raises(NotBuilt, match="LMF_BUILD_CUDA=0"):
        cuda_toolkit()


def test_insisting_on_cuda_kernels_without_a_toolkit_is_an_error(gpus, monkeypatch):
    def no_toolkit(cuda):
        raise NoToolkit("no complete CUDA toolkit found (set CUDA_HOME)")

    monkeypatch.setattr(extension, "find_toolkit", no_toolkit)
    gpus.append((9, 0))
    with pytest.raises(NotBuilt, match="no complete CUDA toolkit"):
        cuda_toolkit()
    monkeypatch.setenv("LMF_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="LMF_BUILD_CUDA=1, but no complete CUDA toolkit"):
        cuda_toolkit()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match="LMF_BUILD_CUDA=1, but this torch was built without CUDA"):
        cuda_toolkit()


def test_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotBuilt, match=r"no C\+\+ compiler was found \(c\+\+ or g\+\+ or clang\+\+\)"):
        find_compiler()
    script(tmp_path / "clang++", "exit 0")
    assert find_compiler() == "clang++"
    script(tmp_path / "g++", "exit 1")
    with pytest.raises(NotBuilt, match=r"the C\+\+ compiler g\+\+ does not know -std=c\+\+20"):
        find_compiler()
    monkeypatch.setenv("CXX", "mine -m64")
    with pytest.raises(NotBuilt, match=r"no C\+\+ compiler was found \(mine -m64\)"):
        find_compiler()
    script(tmp_path / "mine", 'test "$1" = -m64')
    assert find_compiler() == "mine -m64"


# ---- what is left ---------------------------------------------------------------------------------------------------
def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", folder, "--build-lib", folder / "lib"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def installed(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """python with what was built, from another folder, and without the finder of an editable installation."""
    (folder / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
    )
    paths = {"PYTHONPATH": f"{folder / 'lib'}{os.pathsep}{folder}", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | paths | environment, capture_output=True, text=True)


@needs_sources
def test_a_failing_build_leaves_the_python_installation(tmp_path):
    """The compiler passes the question for C++20 and fails later."""
    compiler = script(tmp_path / "broken", 'case "$*" in *fsyntax-only*) exit 0;; esac; exit 1')
    run = build(tmp_path, CXX=str(compiler))
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("lmf_kernels: no native kernels")]
    assert len(said) == 1 and "the build failed" in said[0], run.stderr
    package = tmp_path / "lib" / "lmf_kernels"
    assert not list(package.glob("_C*.so")) and (package / "_build" / "csrc" / "lmf.cpp").exists()
    insisted = build(tmp_path / "again", CXX=str(compiler), LMF_BUILD_NATIVE="1")
    assert insisted.returncode != 0

    use = installed(
        tmp_path, "-c", "import torch, lmf_kernels as l; l.lmf_loss(torch.randn(3, 4), torch.tensor([0, 1, 2]))"
    )
    assert use.returncode == 0, use.stderr
    warnings = [line for line in use.stderr.splitlines() if "UserWarning: lmf_kernels" in line]
    assert len(warnings) == 1 and "the build failed" in warnings[0], use.stderr
    assert "then build it: python -m lmf_kernels build" in warnings[0]

    shown = installed(tmp_path, "-m", "lmf_kernels")
    assert shown.returncode == 0, shown.stderr
    assert "native      not there: it was not built when lmf_kernels was installed: the build failed" in shown.stdout
    assert "reference   on cpu   ok" in shown.stdout

    before = sorted(package.iterdir())
    again = installed(tmp_path, "-m", "lmf_kernels", "build", CXX=str(compiler))
    assert again.returncode == 1 and "the build failed, and nothing was changed" in again.stderr, again.stderr
    assert sorted(package.iterdir()) == before


@needs_sources
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"LMF_BUILD_NATIVE": "0"}, "LMF_BUILD_NATIVE=0"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found (no-such-compiler)"),
        ({"CXX": "false"}, "the C++ compiler false does not know -std=c++20"),
    ],
)
def test_builds_without_the_extension(environment, reason, tmp_path):
    run = build(tmp_path, **environment)
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith("lmf_kernels:")] == [
        f"lmf_kernels: no native kernels: {reason}"
    ]
    assert record.read(tmp_path / "lib" / "lmf_kernels") == Record(why_not=reason)
    if "CXX" in environment:
        insisted = build(tmp_path, LMF_BUILD_NATIVE="1", **environment)
        assert insisted.returncode == 1 and reason in insisted.stderr


def test_records(tmp_path):
    assert record.read(tmp_path) == Record()
    some = Record(torch="2.11.0+cu130", cuda="9.0")
    record.write(tmp_path / "new", some)
    assert record.read(tmp_path / "new") == some
    (tmp_path / record.FILE).write_text('{"unknown": 1}')
    assert record.read(tmp_path) == Record()
    (tmp_path / record.FILE).write_text("half a reco")
    assert record.read(tmp_path) == Record()


# ---- what is said when it is loaded ---------------------------------------------------------------------------------
def problem(monkeypatch, built: Record, error: ImportError) -> str:
    def refuse(name):
        raise error

    monkeypatch.setattr(_native, "built", built)
    monkeypatch.setattr(_native.importlib, "import_module", refuse)
    loaded, reason = _native._load()
    assert loaded is None
    return reason


def test_kernels_of_another_torch_are_named_as_that(monkeypatch):
    """Of another minor version they are not loaded at all, of another build of it where loading fails."""
    undefined = ImportError("_C.so: undefined symbol: _ZN3c10")
    want = (
        f"it was built for torch {{}}, and this is torch {torch.__version__}; rebuild it: python -m lmf_kernels build"
    )
    assert problem(monkeypatch, Record(torch="1.13.1"), ImportError("loaded")) == want.format("1.13.1")
    sibling = ".".join(torch.__version__.split(".")[:2]) + ".99+other"
    assert problem(monkeypatch, Record(torch=sibling), undefined) == want.format(sibling)
    same = problem(monkeypatch, Record(torch=torch.__version__), undefined)
    assert same == "_C.so: undefined symbol: _ZN3c10; rebuild it: python -m lmf_kernels build"


def test_missing_kernels_are_named_as_missing(monkeypatch):
    missing = ModuleNotFoundError("No module named 'lmf_kernels._C'")
    assert problem(monkeypatch, Record(), missing) == f"{missing}; build it: python -m lmf_kernels build"
    reason = problem(monkeypatch, Record(why_not="no C++ compiler was found (c++)"), missing)
    assert reason.startswith("it was not built when lmf_kernels was installed: no C++ compiler was found (c++); then")


def test_the_present_build_has_its_record():
    if _native._C is None:
        pytest.skip(f"needs the native extension, which is not there: {_native.native_problem}")
    assert _native.built.torch == torch.__version__
    assert bool(_native.built.cuda) == ("cuda" in _native._C.devices()) == bool(_native._C.cuda_architectures())
