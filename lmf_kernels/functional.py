"""`lmf_loss`: validation and dispatch."""

import math
import numbers
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._checks import as_float, check_dense, check_memory
from ._hints import target_hint, warn_of_one_class
from ._ops import BACKENDS, check_labels, fused_loss, select_backend
from .class_parallel import ClassGroup, ClassShares, is_dtensor, local_logits, sharded_loss, shares_of
from .reference import MEAN, NONE, SUM, reference_loss

_REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_TINY = torch.finfo(torch.float32).tiny
_TENSORS = ("input", "target", "margins", "ldam_weight", "focal_weight", "normalizer", "normalizer")

Normalizer = float | Tensor | Sequence[float | Tensor]
Reduction = Literal["none", "mean", "sum"]


def lmf_loss(
    input: Tensor,
    target: Tensor,
    *,
    margins: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.5,
    s: float = 30.0,
    weight: Tensor | None = None,
    ldam_weight: Tensor | None = None,
    focal_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: Normalizer | None = None,
    backend: str = "auto",
    class_group: ClassGroup | None = None,
) -> Tensor:
    r"""The LMF loss, alpha * LDAM + beta * focal, in one fused forward and one fused backward kernel.

    For logits z of one sample with target y, p = softmax(z) and margin D = margins[y]::

        LDAM  = -log( exp(s (z_y - D)) / (exp(s (z_y - D)) + sum_{j != y} exp(s z_j)) )
        focal = (1 - p_y)^gamma * (-log p_y)
        loss  = alpha * ldam_weight[y] * LDAM + beta * focal_weight[y] * focal

    Special cases: `alpha=0, gamma=0` or `beta=0, s=1` without margins is cross-entropy, `alpha=0` focal loss, `beta=0`
    LDAM. Loss and gradient keep their relative precision for confident rows, where the formulas above, computed as
    written, return 0 or NaN.

    Args:
        input: unnormalised logits, (C,), (N, C) or (N, C, d1, ..., dk), float16, bfloat16, float32 or float64, of any
            strides; only dimensions d1..dk that do not collapse into one stride are copied first. Never overwritten. A
            single class, whose loss is always 0, warns once.
        target: class indices, (), (N,) or (N, d1, ..., dk), int64 (uint8 is converted by one more kernel launch).
        margins: (C,), the margin of each class, may be negative; None is zeros. See `ldam_margins`.
        alpha: weight of the LDAM term, finite, >= 0.
        beta: weight of the focal term, finite, >= 0.
        gamma: focal exponent, finite, >= 0.
        s: scale of the logits in the LDAM term, finite, > 0. 30 assumes a normalised (cosine) classifier; with 1 the
            LDAM term is the paper's equation 2 to the letter.
        weight: (C,), class weights of both terms; None is ones.
        ldam_weight: (C,), class weights of the LDAM term alone; not together with `weight`.
        focal_weight: (C,), class weights of the focal term alone; not together with `weight`.
        ignore_index: rows with this target have loss 0 and gradient 0 and are not counted; it may lie in [0, C).
        reduction: 'none' keeps the target's shape; 'sum' adds the kept rows; 'mean' divides the LDAM sum by the sum of
            ldam_weight[y] over kept rows (as F.cross_entropy) and the focal sum by the number of kept rows.
        normalizer: replaces the denominators of 'mean': a number > 0, a 0-dim tensor (read on the device), or a pair of
            these for LDAM and focal. For gradient accumulation and global means over data-parallel ranks, where
            `global_normalizer` computes it.
        backend: 'auto', 'triton', 'native' (compiled C++ or CUDA) or 'reference' (eager PyTorch). 'auto' is Triton on
            GPU tensors, else native, else the reference.
        class_group: the process group whose ranks hold the classes between them (docs/many_classes.md): `input` is this
            rank's columns (N, C_local, ...), `target` is the same on all ranks and counts the classes of all ranks, and
            margins and weights are given whole (C,) or as this rank's share (C_local,). Every rank returns the same
            loss and gets the gradient of its own logits. The first call with a group exchanges the ranks' numbers of
            classes and later ones keep them; `ClassShares` serves several heads over one group. DTensor input that
            is sharded on its class axis needs no class_group. Then there is no second derivative.

    Returns:
        The loss: float64 for float64 logits, else float32 (also for half logits). 'mean' without a kept row is NaN,
        with gradient 0. The gradient has the input's dtype and layout.

    Raises:
        ValueError: shapes, ranges, unknown options, `weight` with `ldam_weight` or `focal_weight`, a table that
            requires grad.
        TypeError: dtypes.
        IndexError: a label outside [0, C) that is not `ignore_index`, on the CPU. On a GPU, and from Triton anywhere,
            that row's loss and gradient are NaN instead.
        RuntimeError: tensors on different devices, a backend that is not there, or a collective of class_group that
            failed, within the group's timeout, because another rank did not come to it.

    Source: arXiv 2212.12741, eq. 1 to 3; LDAM: arXiv 1906.07413; focal loss: arXiv 1708.02002.

    Example:
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> target = torch.randint(0, 3, (8,))
        >>> loss = lmf_loss(logits, target, margins=ldam_margins([500, 80, 9]))
        >>> loss.backward()
    """
    reduction_code = check_options(alpha, beta, gamma, s, ignore_index, reduction, backend)
    shares = None
    if is_dtensor(input):
        input, target, shares = local_logits(input, target, class_group)
    logits, target = _check_input_and_target(input, target, sharded=class_group is not None or shares is not None)
    num_classes = logits.shape[1]
    if class_group is not None:
        shares = shares_of(class_group, num_classes, input.device)
    ldam_weight, focal_weight = check_tables(
        margins, weight, ldam_weight, focal_weight, num_classes, input.device, shares
    )
    alpha, beta, reduction_code, ldam_normalizer, focal_normalizer = check_normalizer(
        normalizer, alpha, beta, reduction_code, input.device
    )

    alpha, beta = float(alpha), float(beta)
    if input.dtype != torch.float64:  # a kernel skips a term whose coefficient is 0 in float32, denominator and all
        alpha = 0.0 if alpha < _TINY else alpha
        beta = 0.0 if beta < _TINY else beta

    arguments = (
        logits, target, margins, ldam_weight, focal_weight, ldam_normalizer, focal_normalizer,
        alpha, beta, float(gamma), float(s), ignore_index, reduction_code,
    )  # fmt: skip
    chosen = select_backend(backend, input.device)
    if shares is not None:
        if chosen != "triton":
            check_labels(target, shares.total, ignore_index)
        loss = sharded_loss(chosen, shares, *arguments)
    elif chosen == "reference":
        for name, tensor in zip(_TENSORS, arguments[: len(_TENSORS)], strict=True):
            if isinstance(tensor, Tensor):
                check_memory(name, tensor)
        check_labels(target, num_classes, ignore_index)
        loss = reference_loss(*arguments)
    else:
        loss = fused_loss(chosen, *arguments)
    return loss.reshape(()) if input.dim() == 1 else loss


def check_options(
    alpha: float, beta: float, gamma: float, s: float, ignore_index: int, reduction: str, backend: str
) -> int:
    """Checks the options that need no tensor; returns the code of `reduction`."""
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
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return _REDUCTIONS[reduction]


def check_tables(
    margins: Tensor | None,
    weight: Tensor | None,
    ldam_weight: Tensor | None,
    focal_weight: Tensor | None,
    num_classes: int,
    device: torch.device,
    shares: ClassShares | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Checks margins and class weights; returns the weights of the LDAM and of the focal term."""
    whole = num_classes if shares is None else shares.total
    if weight is not None:
        if ldam_weight is not None or focal_weight is not None:
            raise ValueError("give weight, or ldam_weight and focal_weight, not both: weight sets both terms' weights")
        check_table("weight", weight, num_classes, device, whole)
        ldam_weight = focal_weight = weight
    else:
        if ldam_weight is not None:
            check_table("ldam_weight", ldam_weight, num_classes, device, whole)
        if focal_weight is not None:
            check_table("focal_weight", focal_weight, num_classes, device, whole)
    if margins is not None:
        check_table("margins", margins, num_classes, device, whole)
    return ldam_weight, focal_weight


def check_normalizer(
    normalizer: Normalizer | None, alpha: float, beta: float, reduction: int, device: torch.device
) -> tuple[float, float, int, Tensor | None, Tensor | None]:
    """alpha, beta, the reduction's code and the two normalizer tensors that the kernels are called with."""
    if normalizer is None:
        return alpha, beta, reduction, None, None
    if reduction != MEAN:
        given = next(name for name, code in _REDUCTIONS.items() if code == reduction)
        raise ValueError(f"normalizer replaces the denominators of reduction='mean', got reduction={given!r}")
    ldam, focal = _check_normalizer(normalizer, device)
    if not isinstance(ldam, Tensor) and not isinstance(focal, Tensor):
        return alpha / ldam, beta / focal, SUM, None, None  # the mean is a sum with other coefficients
    return alpha, beta, reduction, _as_tensor(ldam, device), _as_tensor(focal, device)


# Not within check_normalizer: torch.compile of torch 2.8 cannot trace a function made inside with such an annotation.
def _as_tensor(n: float | Tensor, device: torch.device) -> Tensor:
    return n if isinstance(n, Tensor) else torch.full((), n, dtype=torch.float64, device=device)


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


def check_floating(name: str, tensor: Tensor) -> None:
    """Checks that a tensor has a dtype that the kernels take."""
    check_dense(name, tensor)
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _check_input_and_target(input: Tensor, target: Tensor, sharded: bool = False) -> tuple[Tensor, Tensor]:
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
