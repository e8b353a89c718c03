"""Every check of an argument. Errors name the argument, what was given and what was expected."""

import math
import numbers
from collections.abc import Sequence
from typing import Literal, SupportsFloat

import torch
from torch import Tensor

from ._call import BACKENDS, MEAN, REDUCTIONS, SUM, Options, Tables
from ._hints import target_hint, warn_of_one_class

_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_TINY = torch.finfo(torch.float32).tiny

Normalizer = float | Tensor | Sequence[float | Tensor]
Reduction = Literal["none", "mean", "sum"]


# ---- any number, any tensor -----------------------------------------------------------------------------------------
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


def check_floating(name: str, tensor: Tensor) -> None:
    """Checks that a tensor has a dtype that the kernels take."""
    check_dense(name, tensor)
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


# ---- the options ----------------------------------------------------------------------------------------------------
def check_options(
    alpha: float, beta: float, gamma: float, s: float, ignore_index: int, reduction: str, backend: str
) -> Options:
    """Checks the options that need no tensor."""
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma), ("s", s)):
        if not isinstance(value, (float, int, numbers.Real)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 <= (value if type(value) is float else as_float(value)) < math.inf:
            raise ValueError(f"{name} must be finite and {'>' if name == 's' else '>='} 0, got {value}")
    if s == 0:
        raise ValueError(f"s must be finite and > 0, got {s}")
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into int64, got {ignore_index}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return Options(float(alpha), float(beta), float(gamma), float(s), ignore_index, REDUCTIONS[reduction])


# ---- logits and labels ----------------------------------------------------------------------------------------------
def check_logits_and_target(input: Tensor, target: Tensor, sharded: bool = False) -> tuple[Tensor, Tensor]:
    """The checked logits (N, C, ...) and target (N, ...), int64; a share of the classes may be empty."""
    check_floating("input", input)
    shape = input.shape
    target = check_target(target, input)
    if input.dim() == 0:
        raise ValueError("input must have shape (C,), (N, C) or (N, C, d1, ..., dk), got a 0-dim tensor")
    batched = len(shape) > 1
    if shape[batched] < 2 and not sharded:
        if shape[batched] == 0:
            raise ValueError(f"input must have at least one class, got shape {tuple(shape)}")
        warn_of_one_class()
    target_shape = shape[:1] + shape[2:] if batched else shape[:0]
    if target.shape != target_shape:
        raise ValueError(
            f"target must have shape {tuple(target_shape)} for input of shape {tuple(shape)}, got {tuple(target.shape)}"
            f"{target_hint(target, shape)}"
        )
    if target.device != input.device:
        raise RuntimeError(f"target must be on input's device {input.device}, got {target.device}")
    if batched:
        return input, target
    check_memory("input", input)
    check_memory("target", target)
    return input.unsqueeze(0), target.unsqueeze(0)


def check_target(target: Tensor, input: Tensor, linear_weight: Tensor | None = None) -> Tensor:
    """The target as int64; `input` are logits, or features where there is a linear_weight."""
    check_dense("target", target)
    if target.dtype == torch.int64:
        return target
    if target.dtype != torch.uint8:
        logits = input.shape if linear_weight is None else (*input.shape[:-1], len(linear_weight))
        raise TypeError(f"target must be int64 class indices, got {target.dtype}{target_hint(target, logits)}")
    check_memory("target", target)
    return target.long()


def check_labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises IndexError for a bad label where looking costs no synchronisation: plain CPU tensors in eager mode."""
    if target.device.type != "cpu" or type(target) is not Tensor or torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():  # a label under torch.vmap has no one value
        return
    bad = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bad.any():
        raise IndexError(
            f"target {int(target[bad][0])} is out of bounds: labels must lie in [0, {num_classes}) "
            f"or equal ignore_index={ignore_index}"
        )


# ---- margins, class weights and normalizers -------------------------------------------------------------------------
def check_table(
    name: str, table: Tensor, num_classes: int, device: torch.device | None = None, whole: int | None = None
) -> None:
    """Checks margins or class weights: a floating tensor (C,) without grad, on `device` if one is given.

    `whole` is the number of classes of all ranks, where num_classes is this rank's share.
    """
    check_dense(name, table, "(C,)")
    if table.shape != (num_classes,) and table.shape != (whole,):
        share = "" if whole is None or whole == num_classes else f" (this rank's share) or ({whole},) (all classes)"
        raise ValueError(f"{name} must have shape ({num_classes},){share}, one value a class, got {tuple(table.shape)}")
    if table.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {table.dtype}")
    if device is not None and table.device != device:
        raise RuntimeError(f"{name} must be on input's device {device}, got {table.device}")
    if table.requires_grad:
        raise ValueError(f"{name} must not require grad (no gradient is computed for it); detach it")


def class_weights(
    weight: Tensor | None,
    ldam_weight: Tensor | None,
    focal_weight: Tensor | None,
    num_classes: int,
    device: torch.device | None = None,
    whole: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The checked weights of the LDAM and of the focal term; `weight` is both."""
    if weight is not None:
        if ldam_weight is not None or focal_weight is not None:
            raise ValueError("give weight, or ldam_weight and focal_weight, not both: weight sets both terms' weights")
        check_table("weight", weight, num_classes, device, whole)
        return weight, weight
    if ldam_weight is not None:
        check_table("ldam_weight", ldam_weight, num_classes, device, whole)
    if focal_weight is not None:
        check_table("focal_weight", focal_weight, num_classes, device, whole)
    return ldam_weight, focal_weight


def check_tables(
    margins: Tensor | None,
    weight: Tensor | None,
    ldam_weight: Tensor | None,
    focal_weight: Tensor | None,
    num_classes: int,
    device: torch.device,
    whole: int | None,
) -> Tables:
    """Checks margins and class weights; `whole` as in `check_table`."""
    ldam_weight, focal_weight = class_weights(weight, ldam_weight, focal_weight, num_classes, device, whole)
    if margins is not None:
        check_table("margins", margins, num_classes, device, whole)
    return Tables(margins, ldam_weight, focal_weight)


def with_normalizer(
    normalizer: Normalizer | None, tables: Tables, options: Options, device: torch.device
) -> tuple[Tables, Options]:
    """Checks `normalizer` and puts it where the kernels look for it."""
    if normalizer is None:
        return tables, options
    alpha, beta, gamma, s, ignore_index, reduction = options
    if reduction != MEAN:
        given = next(name for name, code in REDUCTIONS.items() if code == reduction)
        raise ValueError(f"normalizer replaces the denominators of reduction='mean', got reduction={given!r}")
    ldam, focal = _check_normalizer(normalizer, device)
    if not isinstance(ldam, Tensor) and not isinstance(focal, Tensor):
        # The mean is a sum with other coefficients.
        return tables, Options(alpha / ldam, beta / focal, gamma, s, ignore_index, SUM)
    margins, ldam_weight, focal_weight, _, _ = tables
    return Tables(margins, ldam_weight, focal_weight, _as_tensor(ldam, device), _as_tensor(focal, device)), options


def without_tiny_terms(options: Options, dtype: torch.dtype) -> Options:
    """Coefficients that are 0 in float32 as 0: a kernel skips such a term, denominator and all."""
    if (options.alpha >= _TINY and options.beta >= _TINY) or dtype == torch.float64:
        return options
    alpha, beta, gamma, s, ignore_index, reduction = options
    alpha, beta = 0.0 if alpha < _TINY else alpha, 0.0 if beta < _TINY else beta
    return Options(alpha, beta, gamma, s, ignore_index, reduction)


# Not within with_normalizer: torch.compile of torch 2.8 cannot trace a function made inside with such an annotation.
def _as_tensor(n: float | Tensor, device: torch.device) -> Tensor:
    return n if isinstance(n, Tensor) else torch.full((), n, dtype=torch.float64, device=device)


def _check_normalizer(normalizer: Normalizer, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
    """The pair of denominators (LDAM, focal), each a number > 0 or a floating 0-dim tensor."""
    pair = normalizer if isinstance(normalizer, (tuple, list)) else (normalizer, normalizer)
    if len(pair) != 2:
        raise ValueError(f"normalizer must be one value or a pair (LDAM, focal), got {len(pair)} values")
    checked: list[float | Tensor] = []
    for value in pair:
        if isinstance(value, Tensor):
            check_dense("normalizer", value)
            if value.dtype.is_complex:
                raise TypeError(f"normalizer must be real, got {value.dtype}")
            if value.dim() != 0:
                raise ValueError(f"normalizer tensors must be 0-dim, got shape {tuple(value.shape)}")
            if value.device != device:
                raise RuntimeError(f"normalizer must be on input's device {device}, got {value.device}")
            if value.requires_grad:
                raise ValueError("normalizer must not require grad (no gradient is computed for it); detach it")
            if value.dtype not in _FLOATING:
                check_memory("normalizer", value)
                value = value.float()
            checked.append(value)
        elif isinstance(value, numbers.Real):
            if not 0 < as_float(value) < math.inf:
                raise ValueError(f"normalizer must be finite and > 0, got {value}")
            checked.append(float(value))
        else:
            raise TypeError(
                f"normalizer must be a number, a 0-dim tensor or a pair of them, got {type(value).__name__}"
            )
    return checked[0], checked[1]
