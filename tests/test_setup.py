"""Which CUDA toolkit the build takes."""

from __future__ import annotations

import pytest

from lmf_kernels._build import toolkit as cuda_toolkit
from lmf_kernels._build.toolkit import NoToolkit, find_toolkit

HEADERS = ("include/cuda_runtime.h", "include/cccl/nv/target")


def install(home, version="13.0", runtime="lib64/libcudart.so"):
    """A toolkit whose nvcc knows its version."""
    for file in ("bin/nvcc", runtime, *HEADERS):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    script = (
        f"#!/bin/sh\ncase $1 in --dryrun) echo '#$ TOP={home}' >&2;; *) echo 'release {version}, V{version}.1';; esac\n"
    )
    (home / "bin" / "nvcc").write_text(script)
    (home / "bin" / "nvcc").chmod(0o755)
    return home


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without any CUDA toolkit; `on_path(folder)` puts a folder on PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_toolkit, "CONVENTIONAL", tmp_path / "conventional")
    monkeypatch.setattr(cuda_toolkit.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return tmp_path


def on_path(folder, monkeypatch):
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_order(machine, monkeypatch):
    packages = machine / "nvidia"
    spec = type("Spec", (), {"submodule_search_locations": [str(packages)]})
    monkeypatch.setattr(cuda_toolkit.importlib.util, "find_spec", lambda name: spec)
    for home in (packages / "cu13", machine / "beside", machine / "conventional", machine / "given"):
        install(home)
        if home.name == "beside":
            on_path(home / "bin", monkeypatch)
        if home.name == "given":
            monkeypatch.setenv("CUDA_HOME", str(home))
        assert find_toolkit("13.0").home == home


@pytest.mark.parametrize("missing", ["bin/nvcc", "lib64/libcudart.so", *HEADERS])
def test_unusable_cuda_home_is_passed_over(missing, machine, monkeypatch):
    home = install(machine / "given")
    (home / missing).unlink()
    monkeypatch.setenv("CUDA_HOME", str(home))
    with pytest.raises(NoToolkit, match="CUDA_HOME"):
        find_toolkit("13.0")
    conventional = install(machine / "conventional")
    assert find_toolkit("13.0").home == conventional


def test_nvcc_script_on_path_leads_to_its_toolkit(machine, monkeypatch):
    """A bare script is not beside headers and libraries."""
    real = install(machine / "real")
    scripts = machine / "prefix" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "nvcc").write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    (scripts / "nvcc").chmod(0o755)
    on_path(scripts, monkeypatch)
    assert find_toolkit("13.0").home == real


def test_link_on_path_leads_to_its_toolkit(machine, monkeypatch):
    real = install(machine / "real")
    (machine / "bin").mkdir()
    (machine / "bin" / "nvcc").symlink_to(real / "bin" / "nvcc")
    on_path(machine / "bin", monkeypatch)
    assert find_toolkit("13.0").home == real


def test_runtime_library_under_its_full_name(machine):
    install(machine / "conventional", runtime="lib/libcudart.so.13")
    assert find_toolkit("13.0").runtime.name == "libcudart.so.13"


def test_other_major_version_is_refused_in_one_sentence(machine):
    home = install(machine / "conventional", version="12.4")
    with pytest.raises(NoToolkit) as refusal:
        find_toolkit("13.0")
    message = str(refusal.value)
    assert str(home) in message and "12.4" in message and "13.0" in message and "\n" not in message


def test_next_toolkit_is_taken_after_one_of_another_version(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(install(machine / "given", version="12.4")))
    conventional = install(machine / "conventional", version="13.0")
    assert find_toolkit("13.1").home == conventional


def test_architectures(machine):
    install(machine / "conventional")
    assert find_toolkit("13.0").architectures == "8.0;9.0;10.0+PTX"
    install(machine / "conventional", version="12.6")
    assert find_toolkit("12.4").architectures == "8.0;9.0+PTX"
