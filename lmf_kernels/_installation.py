"""What `python -m lmf_kernels` prints: versions, backends, why one is missing, and a check of each that is there."""

import platform

import torch
from torch import Tensor

from . import _backends, _ops
from ._native import built, native_problem
from ._versions import TORCH, TORCH_TESTED, TRITON, __version__, text, triton_version
from .functional import lmf_loss

# One case of each way that the kernels have: few classes, a row in registers, a long row, pixels.
SHAPES = ((33, 7), (20, 300), (4, 20000), (2, 5, 9, 8))
BAR = 2e-5  # relative, of every element of loss and gradient in float32


def report() -> tuple[list[str], bool]:
    """The lines, and whether every backend that is there computes what the reference does."""
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    triton = triton_version()
    lines = [
        f"lmf_kernels {__version__}",
        f"python      {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch       {torch.__version__} (from {text(TORCH)}, tested up to {text(TORCH_TESTED)})",
        f"triton      {triton or 'missing'} (from {text(TRITON)})",
        f"GPU         {found}",
        f"native      {_native()}",
        "",
    ]
    sound = True
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for backend in _backends.available_backends(torch.device(device)):
            try:
                result, fine = _check(backend, torch.device(device))
            except Exception as error:  # whatever is wrong with an installation is to be shown
                result, fine = f"{type(error).__name__}: {error}", False
            lines.append(f"{backend:11} on {device:4}  {'ok' if fine else 'FAILED'}, {result}")
            sound &= fine
    lines += [f"{backend:11} not on {device}: {reason}" for backend, device, reason in _missing()]
    cpu, gpu = (_backends.available_backends(torch.device(device))[0] for device in ("cpu", "cuda"))
    lines += ["", f'backend="auto" takes {cpu} on the CPU, {gpu} on a GPU']
    return lines, sound


def _native() -> str:
    if native_problem is not None:
        return f"not there: {native_problem}"
    cuda = f"CUDA kernels for {built.cuda}" if built.cuda else f"no CUDA kernels: {built.why_no_cuda or 'not built'}"
    return f"{_backends.cpu_capability()} instructions on the CPU; {cuda}"


def _missing() -> list[tuple[str, str, str]]:
    """(backend, device, why it does not run there), but of the native kernels, whose line says it."""
    if _ops.no_triton is not None:
        return [("triton", "a GPU", _ops.no_triton)]
    return [] if torch.cuda.is_available() else [("triton", "the CPU", "it needs a GPU, and torch finds none")]


def _step(logits: Tensor, target: Tensor, table: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = lmf_loss(logits, target, margins=table, weight=table, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def _check(backend: str, device: torch.device) -> tuple[str, bool]:
    """Forward and backward of random cases in float32 against the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for shape in SHAPES:
        z = (3 * torch.randn(shape, generator=generator)).to(device)
        y = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator).to(device)
        table = torch.rand(shape[1], generator=generator).to(device)
        found, exact = _step(z, y, table, backend), _step(z.double(), y, table, "reference")
        for got, want in zip(found, exact, strict=True):
            error = (got.double() - want).abs() / want.abs().clamp_min(1e-30)
            worst = max(worst, float(error.nan_to_num(nan=float("inf")).max()))
    return f"loss and gradient within {worst:.0e} of the float64 reference (allowed {BAR:.0e})", worst <= BAR
