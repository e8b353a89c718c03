"""`linear_lmf_loss`: a linear classifier and the LMF loss together, without the logits in memory.

Logits are made in chunks by torch's matrix products, and the loss part is the kernels on each chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import select_backend
from .._hints import target_hint, warn_of_one_class
from .._validate import (
    Normalizer,
    Reduction,
    check_floating,
    check_options,
    check_tables,
    check_target,
    with_normalizer,
)
from ..math.rows import AUTOCAST_DEVICES, no_autocast
from ..sharded.shares import ClassGroup, shares_of
from .autograd import HeadOptions, linear_loss
from .chunks import EPS


def linear_lmf_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
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
    memory_budget: int | None = None,
    class_group: ClassGroup | None = None,
) -> Tensor:
    r"""`lmf_loss(F.linear(input, linear_weight, linear_bias), target)` without its logits in memory.

    For features x of one sample, weights W_j and biases b_j of the classes j::

        z_j  = <x, W_j> + b_j                            or, with normalize, <x / |x|, W_j / |W_j|> + b_j
        loss = LMF loss of the logits z, as in `lmf_loss`

    Logits exist a chunk at a time, in the features' dtype as F.linear's. For 'mean' and 'sum' forward also computes the
    gradients, of those of input, linear_weight and linear_bias that require one, and backward scales them; 'none', and
    backward through a retained graph, make the logits again. The weight's gradient adds up in float32 for half inputs.

    Args:
        input: features, (N, D) or (D,), float16, bfloat16, float32 or float64.
        linear_weight: (C, D), the features' dtype.
        target: class indices, (N,) or (), int64 or uint8.
        linear_bias: (C,), the features' dtype.
        normalize: cosine classifier: features and the rows of linear_weight are divided by their norms (at least
            1e-12), and gradients go through that. s = 30 is meant for this. The published ones have no bias.
        margins, alpha, beta, gamma, s, weight, ldam_weight, focal_weight, ignore_index, reduction, normalizer, backend:
            as in `lmf_loss`.
        memory_budget: bytes for a chunk of logits and its temporaries; None is 64 MiB, or 1/32 of all logits if that is
            more. Beyond inputs, gradients and, for half inputs, the weight gradient's float32 accumulator little else
            is allocated: the sums (5 numbers a row), and with `normalize` the normalised features.
        class_group: the process group whose ranks hold the classes between them, or `ClassShares`; see `lmf_loss`.
            linear_weight and linear_bias are this rank's, input and target are the same on all ranks. Backward sums
            the features' gradient over the group; all ranks must agree on whether input requires one.

    Returns:
        The loss: float64 for float64 features, else float32. 0-dim, or the target's shape for 'none'.

    Raises:
        ValueError, TypeError, IndexError: as `lmf_loss`, and for shapes or dtypes that do not fit each other.
        RuntimeError: as `lmf_loss`; a second derivative is asked for.

    Example:
        >>> features = torch.randn(8, 16, requires_grad=True)
        >>> linear_weight = torch.randn(1000, 16, requires_grad=True)
        >>> loss = linear_lmf_loss(features, linear_weight, torch.randint(0, 1000, (8,)), normalize=True)
        >>> loss.backward()
    """
    options = check_options(alpha, beta, gamma, s, ignore_index, reduction, backend)
    target = _check_linear(input, linear_weight, linear_bias, target, class_group is not None)
    device, num_classes = input.device, linear_weight.shape[0]
    shares = None if class_group is None else shares_of(class_group, num_classes, device)
    whole = None if shares is None else shares.total
    tables = check_tables(margins, weight, ldam_weight, focal_weight, num_classes, device, whole)
    tables, options = with_normalizer(normalizer, tables, options, device)
    if memory_budget is not None and (type(memory_budget) is not int or memory_budget <= 0):
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget!r}")
    chosen = select_backend(backend, device)

    if device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type):  # as F.linear there
        dtype = torch.get_autocast_dtype(device.type)

        def cast(tensor: Tensor) -> Tensor:
            return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

        input, linear_weight = cast(input), cast(linear_weight)
        linear_bias = None if linear_bias is None else cast(linear_bias)
    tensors = [t for t in (input, linear_weight, linear_bias) if t is not None]
    if any(t.dtype != input.dtype for t in tensors):
        raise TypeError(
            "input, linear_weight and linear_bias must have one dtype, got " + ", ".join(str(t.dtype) for t in tensors)
        )
    with no_autocast(device.type):
        features = F.normalize(input, dim=-1, eps=EPS) if normalize else input
        if input.dim() == 1:
            features, target = features.unsqueeze(0), target.unsqueeze(0)
        head = HeadOptions(normalize, chosen.name, memory_budget or 0)
        loss = linear_loss(shares, features, linear_weight, linear_bias, target, tables, options, head)
    return loss.reshape(()) if input.dim() == 1 else loss


def _check_linear(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, sharded: bool
) -> Tensor:
    """The checked target, int64."""
    named = {"input": input, "linear_weight": linear_weight}
    if linear_bias is not None:
        named["linear_bias"] = linear_bias
    for name, tensor in named.items():
        check_floating(name, tensor)
        if tensor.device != input.device:
            raise RuntimeError(f"{name} must be on input's device {input.device}, got {tensor.device}")
    if input.dim() not in (1, 2):
        raise ValueError(f"input must have shape (N, D) or (D,), got {tuple(input.shape)}")
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must have shape (C, {input.shape[-1]}) for input of shape {tuple(input.shape)}, "
            f"got {tuple(linear_weight.shape)}"
        )
    if linear_weight.shape[0] < 2 and not sharded:
        if linear_weight.shape[0] == 0:
            raise ValueError("linear_weight must have at least one class, got shape " + str(tuple(linear_weight.shape)))
        warn_of_one_class()
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"linear_bias must have shape ({linear_weight.shape[0]},), one value a class, "
            f"got {tuple(linear_bias.shape)}"
        )
    target = check_target(target, input, linear_weight)
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have shape {tuple(input.shape[:-1])} for input of shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}{target_hint(target, (*input.shape[:-1], linear_weight.shape[0]))}"
        )
    if target.device != input.device:
        raise RuntimeError(f"target must be on input's device {input.device}, got {target.device}")
    return target
