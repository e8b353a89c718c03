"""What is asked of every number and tensor that a caller gives, whatever it means."""

import math
from typing import SupportsFloat

import torch
from torch import Tensor


def as_float(value: SupportsFloat) -> float:
    """float(value); infinite for integers that no float64 can hold."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def check_dense(name: str, tensor: Tensor, shape: str = "") -> None:
    """Raises TypeError for what is no tensor, and for sparse, nested and other tensors without strides."""
    if not isinstance(tensor, Tensor):
        of_shape = f" of shape {shape}" if shape else ""
        raise TypeError(f"{name} must be a tensor{of_shape}, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {kind}")


def check_memory(name: str, tensor: Tensor) -> None:
    """Raises RuntimeError for a tensor whose storage was emptied or shrunk, which PyTorch's own ops do not survive.

    Only where storages exist: not for subclasses, under torch.func's transforms or in a graph. The native ops look
    themselves.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or tensor.numel() == 0:
        return
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed, found = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > found:
        raise RuntimeError(
            f"{name} of shape {tuple(tensor.shape)} needs {needed} bytes, but its storage holds {found}: its memory "
            "was released or resized"
        )
