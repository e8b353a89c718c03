"""The backends, one row each, and which of them computes the loss of a tensor.

In eager mode a row's kernels are called by a shorter way than the registered op: past the op's own autograd step, which
_autograd.py replaces, and for plain tensors past the dispatcher, which would double the host's time.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._call import Options, Tables
from ._native import _C, BUILD, built, native_problem
from ._ops import OPS, Ops, no_triton, triton_kernels
from ._versions import triton_version
from .math import slices


class Kernels(NamedTuple):
    """The four steps, with the arguments of _call.py in their groups.

    forward(logits, target, tables, options) -> loss, saved, denominators
    backward(grad_output, logits, target, saved, denominators, options) -> grad_logits
    backward_(the same), which writes the gradient over the logits, and takes labels outside [0, C)
    sums(logits, target, first_class, options) -> sums (4, rows)
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]
    backward_: Callable[..., None]
    sums: Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Backend:
    name: str
    kernels: Kernels  # for eager mode
    in_graph: Kernels | None  # the registered ops, for torch.compile and torch.export; None for eager PyTorch
    raises_for_labels: bool  # IndexError for a bad label, where looking costs no synchronisation; else NaN
    extra_copies: int  # of a chunk of float32 logits, which its sums and its gradient take beyond it


def grouped(ops: Ops) -> Kernels:
    """Ops, or whatever has their flat arguments, as kernels."""

    def forward(logits: Tensor, target: Tensor, tables: Tables, options: Options) -> Any:
        return ops.forward(logits, target, *tables, *options)

    def backward(
        grad_output: Tensor, logits: Tensor, target: Tensor, saved: Tensor, denominators: Tensor, options: Options
    ) -> Any:
        return ops.backward(grad_output, logits, target, saved, denominators, *options)

    def backward_(
        grad_output: Tensor, logits: Tensor, target: Tensor, saved: Tensor, denominators: Tensor, options: Options
    ) -> None:
        ops.backward_(grad_output, logits, target, saved, denominators, *options)

    def sums(logits: Tensor, target: Tensor, first_class: int, options: Options) -> Any:
        return ops.sums(logits, target, first_class, *options)

    return Kernels(forward, backward, backward_, sums)


def _is_plain(tensor: Any) -> bool:
    """Whether it is a tensor whose memory holds its values; that of vmap's batched tensors is elsewhere."""
    return type(tensor) is Tensor and torch._C._has_storage(tensor) and not tensor.is_neg()


def _is_watched() -> bool:
    """Whether fake tensors, dispatch modes or torch.func want to see ops."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def _triton(op: Kernels) -> Kernels:
    def are_numbers(options: Options) -> bool:  # arguments of wrong types are for the op to refuse
        return all(type(option) is float or type(option) is int for option in options)

    def forward(logits: Tensor, target: Tensor, tables: Tables, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        if (
            not _is_watched()
            and _is_plain(logits)
            and _is_plain(target)
            and all(table is None or _is_plain(table) for table in tables)
            and are_numbers(options)
        ):
            return triton_kernels().forward(logits, target, tables, options)
        with torch._C._AutoDispatchBelowAutograd():
            return op.forward(logits, target, tables, options)

    def backward(*arguments: Any) -> Tensor:
        *tensors, options = arguments
        if not _is_watched() and all(map(_is_plain, tensors)) and are_numbers(options):
            return triton_kernels().backward(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op.backward(*arguments)

    return op._replace(forward=forward, backward=backward)


_IN_GRAPH = {name: grouped(ops) for name, ops in OPS.items()}
TABLE = {
    "triton": Backend(
        "triton", _triton(_IN_GRAPH["triton"]), _IN_GRAPH["triton"], raises_for_labels=False, extra_copies=0
    ),
    # Eager temporaries in the accumulation type, and masks.
    "reference": Backend(
        "reference",
        Kernels(slices.forward, slices.backward, slices.backward_, slices.slice_sums),
        None,
        raises_for_labels=True,
        extra_copies=3,
    ),
}
if _C is not None:
    _eager = grouped(OPS["native"]._replace(forward=_C.native_forward, backward=_C.native_backward))
    TABLE["native"] = Backend("native", _eager, _IN_GRAPH["native"], raises_for_labels=True, extra_copies=0)
_native_devices: tuple[str, ...] = () if _C is None else tuple(_C.devices())


# ---- the choice -----------------------------------------------------------------------------------------------------
def available_backends(device: torch.device) -> tuple[str, ...]:
    """The backends that can run on tensors of `device` in this installation, best first."""
    found = []
    if device.type == "cuda" and no_triton is None:
        found.append("triton")
    if device.type in _native_devices:
        found.append("native")
    return (*found, "reference")


def cpu_capability() -> str:
    """The instruction set of the native CPU kernels ("baseline", "avx2", "avx512"), or "none" without them."""
    return "none" if _C is None else _C.cpu_capability()


_BEST = {"cpu": "native", "cuda": "triton"}
_auto_choice = {name: available_backends(torch.device(name))[0] for name in _BEST}
_warned: set[str] = set()  # device types that use another backend for want of the best


def select_backend(backend: str, device: torch.device) -> Backend:
    """Decides which backend computes the loss of tensors on `device`; the one place that does.

    "auto" takes Triton on CUDA and ROCm tensors, else the native kernels, else (with one warning) the reference.
    Devices that no fused kernel knows (MPS, XPU, meta) use the reference without a warning. An explicit "triton" does
    not look at the device, so that Triton's interpreter can run on CPU tensors.

    Raises:
        RuntimeError: a backend that is not there, with what is missing and how to get it.
    """
    if backend == "auto":
        choice = _auto_choice.get(device.type)
        if choice is None:
            return TABLE["reference"]
        if choice != _BEST[device.type] and device.type not in _warned and not torch.compiler.is_compiling():
            _warned.add(device.type)
            _warn_of(choice, device)
        return TABLE[choice]
    if backend == "native":
        if device.type not in _native_devices:
            raise RuntimeError(f'backend="native" is not available for {device.type} tensors: {_missing(device)}')
    elif backend == "triton" and no_triton is not None:
        raise RuntimeError(f'backend="triton" is not available: {no_triton}')
    return TABLE[backend]


def _warn_of(choice: str, device: torch.device) -> None:
    """Says why a device's best backend is not used, unless it is native without any Triton, which was a choice."""
    reasons = [no_triton] if device.type == "cuda" and no_triton else []
    if choice == "reference":
        reasons.append(_missing(device))
        warnings.warn(f"lmf_kernels uses its slow eager reference on {device.type}: {'; '.join(reasons)}", stacklevel=4)
    elif triton_version() is not None:
        warnings.warn(f'lmf_kernels uses backend="{choice}" on {device.type}: {reasons[0]}', stacklevel=4)


def _missing(device: torch.device) -> str:
    if native_problem is not None:
        return f"the compiled extension lmf_kernels._C cannot be used: {native_problem}"
    if device.type == "cuda":
        reason = f" ({built.why_no_cuda})" if built.why_no_cuda else ""
        return (
            f"the extension was built without CUDA{reason}; with a CUDA toolkit, rebuild it: LMF_BUILD_CUDA=1 {BUILD}"
        )
    return "there are no native kernels for this device"
