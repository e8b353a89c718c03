"""What importing costs, and what is left where Triton, the extension or CUDA are not there; each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lmf_kernels
from lmf_kernels import _backends

CPU = _backends.available_backends(torch.device("cpu"))
ROOT = Path(lmf_kernels.__file__).parents[1]

# Blocks imports as a missing package does, whatever is installed.
BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED or name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def block(*names):
    global BLOCKED
    BLOCKED = names
    sys.meta_path.insert(0, Missing())
"""

USE = """
import warnings
import torch
import lmf_kernels
from lmf_kernels import FocalLoss, LMFLoss, class_counts, lmf_loss
z, y = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 0])
def error_of(function, *args, **options):
    try:
        function(*args, **options)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("nothing was raised")
def use(backend="auto"):
    for criterion in (LMFLoss(class_counts(y, 4), backend=backend), FocalLoss(backend=backend)):
        loss = criterion(z, y)
        (grad,) = torch.autograd.grad(loss, z)
        want = lmf_loss(z, y, margins=getattr(criterion, "margins", None), alpha=criterion.alpha, backend="reference")
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(grad, torch.autograd.grad(want, z)[0])
"""


def in_fresh_python(code, **environment):
    command = [sys.executable, "-c", BLOCK + code]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_import_costs_little_and_brings_nothing_else():
    """No Triton, neither by importing nor by calls on the CPU, and no question to CUDA. Measured are hundredths of
    torch's own time. Of the CPU, as a cold disk and other processes are the machine's; the bound is far from both."""
    in_fresh_python(
        """
import time
start = time.process_time()
import torch
between = time.process_time()
before = set(sys.modules)
import lmf_kernels
end = time.process_time()
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new - {"lmf_kernels"} <= set(sys.stdlib_module_names), new
assert end - between < 0.25 * (between - start), (end - between, between - start)
"""
        + USE
        + """
use()
assert "triton" in before or "triton" not in sys.modules
assert not torch.cuda.is_initialized()
""",
        CUDA_VISIBLE_DEVICES="",
    )


def test_without_triton():
    in_fresh_python(
        'block("triton")'
        + USE
        + """
assert "triton" not in sys.modules
use()
use("reference")
message = error_of(lmf_loss, z, y, backend="triton")
assert "triton" in message and "pip install triton" in message, message
raw = (z, y, None, None, None, None, None, 1.0, 1.0, 1.5, 30.0, -100, 1)
assert "pip install triton" in error_of(torch.ops.lmf_kernels.triton_forward, *raw)
raw = (torch.ones(()), z, y, torch.ones(5, 6), torch.ones(2), *raw[7:])
assert "pip install triton" in error_of(torch.ops.lmf_kernels.triton_backward, *raw)
assert lmf_kernels._backends.available_backends(torch.device("cuda"))[0] != "triton"
"""
    )


def test_without_the_extension():
    in_fresh_python(
        'block("lmf_kernels._C")'
        + USE
        + """
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    use()
    use()
texts = [str(warning.message) for warning in seen if "lmf_kernels" in str(warning.message)]
assert len(texts) == 1 and "reference" in texts[0] and "python -m lmf_kernels build" in texts[0], texts
message = error_of(lmf_loss, z, y, backend="native")
assert "No module named 'lmf_kernels._C'; build it: python -m lmf_kernels build" in message, message
assert lmf_kernels._backends.cpu_capability() == "none"
"""
    )


def test_without_both():
    in_fresh_python(
        'block("lmf_kernels._C", "triton")'
        + USE
        + """
warnings.simplefilter("ignore")
use()
assert "lmf_kernels build" in error_of(lmf_loss, z, y, backend="native")
assert "pip install triton" in error_of(lmf_loss, z, y, backend="triton")
"""
    )


def test_extension_built_without_cuda_and_devices_that_no_kernel_knows():
    in_fresh_python(
        USE
        + """
from lmf_kernels import _backends
_backends._native_devices = ("cpu",)  # as such a build answers
use()
message = error_of(_backends.select_backend, "native", torch.device("cuda"))
assert "without CUDA" in message and "toolkit" in message and "LMF_BUILD_CUDA=1" in message, message
_backends.no_triton = "the package triton is missing"
_backends._auto_choice["cuda"] = _backends.available_backends(torch.device("cuda"))[0]
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert _backends.select_backend("auto", torch.device("cuda")).name == "reference"
(text,) = (str(warning.message) for warning in seen)
assert "without CUDA" in text and "triton is missing" in text, text
warnings.simplefilter("error")
for device in ("mps", "xpu", "meta"):
    assert _backends.select_backend("auto", torch.device(device)).name == "reference"
    message = error_of(_backends.select_backend, "native", torch.device(device))
    assert device in message and "no native kernels" in message, message
"""
    )


def test_torch_that_is_too_old_gets_one_sentence_with_the_range():
    in_fresh_python(
        """
import torch, warnings
torch.__version__ = "2.4.1+cu121"
try:
    import lmf_kernels
except ImportError as error:
    assert str(error) == ("lmf_kernels needs torch >= 2.8 (tested up to 2.15), found 2.4.1+cu121: "
                          "pip install 'torch>=2.8'"), error
else:
    raise AssertionError("nothing was raised")
"""
    )
    in_fresh_python(
        """
import torch, warnings
torch.__version__ = "2.6.0"
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import lmf_kernels
(text,) = (str(one.message) for one in seen if "lmf_kernels" in str(one.message))
assert "torch >= 2.8" in text and "found 2.6.0" in text, text
"""
    )


@pytest.mark.parametrize("native_on_cuda", [True, False])
def test_triton_that_is_too_old_is_passed_over_with_one_warning(native_on_cuda, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text('__version__ = "3.3.1"\nraise AssertionError("imported")\n')
    in_fresh_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        + USE
        + f"""
from lmf_kernels import _backends
use()
message = error_of(lmf_loss, z, y, backend="triton")
assert "triton 3.3.1 is too old" in message and "triton >= 3.4" in message, message
_backends._native_devices = ("cpu", "cuda") if {native_on_cuda} else ("cpu",)
want = _backends._auto_choice["cuda"] = _backends.available_backends(torch.device("cuda"))[0]
assert want == ("native" if {native_on_cuda} else "reference")
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert _backends.select_backend("auto", torch.device("cuda")).name == want
    assert _backends.select_backend("auto", torch.device("cuda")).name == want
(text,) = (str(one.message) for one in seen)
assert want in text and "on cuda" in text and "triton 3.3.1 is too old" in text, text
"""
    )


def test_the_installation_is_shown_and_checked():
    command = [sys.executable, "-m", "lmf_kernels"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == f"lmf_kernels {lmf_kernels.__version__}"
    assert any(line.startswith("torch") and torch.__version__ in line for line in lines)
    checked = [line.split()[0] for line in lines if " ok, loss and gradient within " in line]
    assert checked[: len(CPU)] == list(CPU), run.stdout


def test_an_installation_that_computes_something_else_is_reported():
    in_fresh_python(
        """
import dataclasses
import torch
from lmf_kernels import _backends, _installation
row = _backends.TABLE["native"]
def with_forward(forward):
    _backends.TABLE["native"] = dataclasses.replace(row, kernels=row.kernels._replace(forward=forward))
def wrong(*arguments):
    loss, saved, denominators = row.kernels.forward(*arguments)
    return loss * (1 + 1e-4), saved, denominators
with_forward(wrong)
lines, sound = _installation.report()
assert not sound and any(line.startswith("native") and "FAILED" in line for line in lines), lines
def broken(*arguments):
    raise OSError("no such kernel")
with_forward(broken)
lines, sound = _installation.report()
assert not sound and any("FAILED, OSError: no such kernel" in line for line in lines), lines
"""
    )
