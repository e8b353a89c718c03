"""The loss of a linear classifier for torch: two opaque ops, so that a compiler neither takes the chunks apart nor
keeps them, and the autograd function over them.

Gradients of the mean and the sum are computed in forward, and backward scales them.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ._call import Options, Tables, schema_of
from .class_parallel import ClassShares, explained, refuse_second_derivative
from .linear_chunks import GPU_SLICE, steps
from .linear_passes import backward_by_chunks, forward_by_chunks
from .reference import MEAN, NONE
from .row_sums import accumulation_dtype

_library = torch.library.Library("lmf_kernels", "FRAGMENT")
_HEAD = "Tensor features, Tensor weight, Tensor? bias, Tensor target"
_GRADIENTS = "Tensor grad_features, Tensor grad_weight, Tensor grad_bias"
_library.define(
    f"linear_forward({_HEAD}, {schema_of(Tables)}, {schema_of(Options)}, "
    "bool normalize, str backend, int memory_budget, float scale, bool[] needs) -> "
    f"(Tensor loss, Tensor saved, Tensor denominators, {_GRADIENTS})"
)
_library.define(
    f"linear_backward(Tensor grad_output, {_HEAD}, Tensor saved, Tensor denominators, {schema_of(Options)}, "
    f"bool normalize, str backend, int memory_budget, bool[] needs) -> ({_GRADIENTS})"
)
_library.impl("linear_forward", lambda *arguments: forward_by_chunks(None, *arguments), "CompositeExplicitAutograd")
_library.impl("linear_backward", backward_by_chunks, "CompositeExplicitAutograd")


def _fake_gradients(features: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(features.dtype)
    return (
        features.new_empty(features.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,), dtype=acc),
        weight.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=acc),
    )


@torch.library.register_fake("lmf_kernels::linear_forward", lib=_library)
def _fake_forward(features: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    acc, reduction = accumulation_dtype(features.dtype), arguments[12]
    return (
        features.new_empty(features.shape[:1] if reduction == NONE else (), dtype=acc),
        features.new_empty((5, features.shape[0]), dtype=acc),
        features.new_empty((2 if reduction == MEAN else 0,), dtype=acc),
        *_fake_gradients(features, weight, arguments[-1]),
    )


@torch.library.register_fake("lmf_kernels::linear_backward", lib=_library)
def _fake_backward(
    grad_output: Tensor, features: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(features, weight, arguments[-1])


class LinearLoss(torch.autograd.Function):
    """The loss, differentiable once in features, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        needs: tuple[bool, bool, bool],
        shares: ClassShares | None,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        *arguments: Any,
    ) -> Tensor:
        alpha, beta, gamma, s, ignore_index, reduction, normalize, backend, memory_budget = arguments[5:]
        now = needs if reduction != NONE else (False,) * 3
        scale = _gradient_scale(features, alpha, beta, s, reduction) if any(now) else 1.0
        arguments = features, weight, bias, target, *arguments, scale, now
        if shares is None:
            loss, saved, denominators, *gradients = torch.ops.lmf_kernels.linear_forward(*arguments)
        else:
            loss, saved, denominators, *gradients = forward_by_chunks(shares, *arguments)
        kept = gradients if any(now) and torch.compiler.is_compiling() else []
        ctx.save_for_backward(features, weight, bias, target, saved, denominators, *kept)
        # Not among the saved tensors: the first backward scales them in place and gives them away.
        ctx.gradients = gradients if any(now) and not kept else None
        ctx.scale = scale
        ctx.needs, ctx.shares = needs, shares
        ctx.options = alpha, beta, gamma, s, ignore_index, reduction, normalize, backend, memory_budget
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_lmf_loss")
        features, weight, bias, target, saved, denominators, *gradients = ctx.saved_tensors
        factor = None
        if ctx.gradients is not None:
            gradients, ctx.gradients = ctx.gradients, None
        if gradients:
            factor = grad_output / ctx.scale
        elif ctx.shares is None:
            gradients = torch.ops.lmf_kernels.linear_backward(
                grad_output, features, weight, bias, target, saved, denominators, *ctx.options, ctx.needs
            )
        else:
            target = target - ctx.shares.first
            arguments = grad_output, features, weight, bias, target, saved, denominators, *ctx.options, ctx.needs
            gradients = list(backward_by_chunks(*arguments))
        results = [
            _scaled(gradient, factor, features.dtype) if need else None
            for gradient, need in zip(gradients, ctx.needs, strict=True)
        ]
        if ctx.shares is not None and results[0] is not None and len(ctx.shares.sizes) > 1:
            import torch.distributed as dist

            with explained("the sum-reduction of the features' gradient", ctx.shares.group):
                dist.all_reduce(results[0], dist.ReduceOp.SUM, group=ctx.shares.group)
        return (None, None, *results, *(None,) * 15)


@_disable_dynamo
def linear_loss_of_share(*arguments: Any) -> Tensor:
    """`LinearLoss`, which torch.compile leaves alone where ranks exchange something."""
    return LinearLoss.apply(*arguments)


def _gradient_scale(features: Tensor, alpha: float, beta: float, s: float, reduction: int) -> float:
    """What gradients that were computed in forward are scaled by until backward, when the loss's own scale is known.

    In float16 the gradients of a mean would underflow: the largest are brought to about 32, by a power of two.
    """
    largest = alpha * s + beta
    if features.dtype != torch.float16 or largest == 0:
        return 1.0
    rows = max(1, len(features)) if reduction == MEAN else 1
    return 2.0 ** max(0, math.floor(math.log2(32 * rows / largest)))


def _scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient times factor in dtype; in place, or a slice at a time into a new tensor."""
    if torch.compiler.is_compiling():
        return gradient.to(dtype) if factor is None else (gradient * factor).to(dtype)
    if gradient.dtype == dtype:
        return gradient if factor is None else gradient.mul_(factor)
    result = torch.empty_like(gradient, dtype=dtype)
    row = max(1, gradient[:1].numel()) * gradient.element_size()
    for part in steps(len(gradient), GPU_SLICE // row):
        result[part] = gradient[part] if factor is None else gradient[part] * factor
    return result
