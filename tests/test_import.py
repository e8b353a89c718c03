"""What importing costs, and what is left where Triton, the extension or CUDA are not there; each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lmf_kernels

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
raw = (torch.ones(()), z, y, torch.ones(5, 6), torch.ones(2), 1.0, 1.0, 30.0)
assert "pip install triton" in error_of(torch.ops.lmf_kernels.triton_backward, *raw)
assert lmf_kernels._ops.available_backends(torch.device("cuda"))[0] != "triton"
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
assert len(texts) == 1 and "reference" in texts[0] and "compiler" in texts[0], texts
message = error_of(lmf_loss, z, y, backend="native")
assert "lmf_kernels._C" in message and "compiler" in message and "reinstall" in message, message
assert lmf_kernels._ops.cpu_capability() == "none"
"""
    )


def test_without_both():
    in_fresh_python(
        'block("lmf_kernels._C", "triton")'
        + USE
        + """
warnings.simplefilter("ignore")
use()
assert "compiler" in error_of(lmf_loss, z, y, backend="native")
assert "pip install triton" in error_of(lmf_loss, z, y, backend="triton")
"""
    )


def test_extension_built_without_cuda_and_devices_that_no_kernel_knows():
    in_fresh_python(
        USE
        + """
from lmf_kernels import _ops
_ops._native_devices = ("cpu",)  # as such a build answers
use()
message = error_of(_ops.select_backend, "native", torch.device("cuda"))
assert "without CUDA" in message and "install triton" in message and "toolkit" in message, message
_ops.HAS_TRITON = False
_ops._auto_choice["cuda"] = _ops.available_backends(torch.device("cuda"))[0]
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert _ops.select_backend("auto", torch.device("cuda")) == "reference"
assert len(seen) == 1 and "without CUDA" in str(seen[0].message), seen
warnings.simplefilter("error")
for device in ("mps", "xpu", "meta"):
    assert _ops.select_backend("auto", torch.device(device)) == "reference"
    message = error_of(_ops.select_backend, "native", torch.device(device))
    assert device in message and "no native kernels" in message, message
"""
    )
