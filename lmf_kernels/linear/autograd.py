"""The loss of a linear classifier for torch: two opaque ops, so that a compiler neither takes the chunks apart nor
keeps them, and the autograd function over them.

Gradients of the mean and the sum are computed in forward, and backward scales them.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .._call import MEAN, NONE, Options, Tables, schema_of, unpack
from ..math.rows import accumulation_dtype
from ..sharded.loss import refuse_second_derivative
from ..sharded.shares import ClassShares, explained
from .call import Classifier, HeadOptions, Needs
from .chunks import GPU_SLICE, steps
from .passes import backward_by_chunks, forward_by_chunks

_library = torch.library.Library("lmf_kernels", "FRAGMENT")
_GRADIENTS = "Tensor grad_features, Tensor grad_weight, Tensor grad_bias"
_library.define(
    f"linear_forward({schema_of(Classifier)}, Tensor target, {schema_of(Tables)}, {schema_of(Options)}, "
    f"{schema_of(HeadOptions)}, float scale, bool[] needs) -> "
    f"(Tensor loss, Tensor saved, Tensor denominators, {_GRADIENTS})"
)
_library.define(
    f"linear_backward(Tensor grad_output, {schema_of(Classifier)}, Tensor target, Tensor saved, Tensor denominators, "
    f"{schema_of(Options)}, {schema_of(HeadOptions)}, bool[] needs) -> ({_GRADIENTS})"
)


def _forward_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The flat arguments of linear_forward in their groups."""
    classifier, target, *rest = unpack(arguments, Classifier)
    return classifier, target, *unpack(rest, Tables, Options, HeadOptions)


def _backward_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those of linear_backward."""
    grad_output, *rest = arguments
    classifier, target, saved, denominators, *rest = unpack(rest, Classifier)
    return grad_output, classifier, target, saved, denominators, *unpack(rest, Options, HeadOptions)


def forward_op(*flat: Any) -> tuple[Tensor, ...]:
    return forward_by_chunks(None, *_forward_arguments(flat))


def backward_op(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backward_by_chunks(*_backward_arguments(flat))


_library.impl("linear_forward", forward_op, "CompositeExplicitAutograd")
_library.impl("linear_backward", backward_op, "CompositeExplicitAutograd")


def _fake_gradients(classifier: Classifier, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    features, weight, _ = classifier
    acc = accumulation_dtype(features.dtype)
    return (
        features.new_empty(features.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,), dtype=acc),
        weight.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=acc),
    )


@torch.library.register_fake("lmf_kernels::linear_forward", lib=_library)
def _fake_forward(*flat: Any) -> tuple[Tensor, ...]:
    classifier, _, _, options, _, _, needs = _forward_arguments(flat)
    features, reduction = classifier.features, options.reduction
    acc = accumulation_dtype(features.dtype)
    return (
        features.new_empty(features.shape[:1] if reduction == NONE else (), dtype=acc),
        features.new_empty((5, features.shape[0]), dtype=acc),
        features.new_empty((2 if reduction == MEAN else 0,), dtype=acc),
        *_fake_gradients(classifier, needs),
    )


@torch.library.register_fake("lmf_kernels::linear_backward", lib=_library)
def _fake_backward(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, classifier, *_, needs = _backward_arguments(flat)
    return _fake_gradients(classifier, needs)


class LinearLoss(torch.autograd.Function):
    """The loss, differentiable once in features, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        shares: ClassShares | None,
        needs: Needs,
        tables: Tables,
        options: Options,
        head: HeadOptions,
    ) -> Tensor:
        now = needs if options.reduction != NONE else (False, False, False)
        scale = _gradient_scale(features, options) if any(now) else 1.0
        classifier = Classifier(features, weight, bias)
        if shares is None:
            loss, saved, denominators, *gradients = torch.ops.lmf_kernels.linear_forward(
                *classifier, target, *tables, *options, *head, scale, now
            )
        else:
            loss, saved, denominators, *gradients = forward_by_chunks(
                shares, classifier, target, tables, options, head, scale, now
            )
        kept = gradients if any(now) and torch.compiler.is_compiling() else []
        ctx.save_for_backward(features, weight, bias, target, saved, denominators, *kept)
        # Not among the saved tensors: the first backward scales them in place and gives them away.
        ctx.gradients = gradients if any(now) and not kept else None
        ctx.scale = scale
        ctx.needs, ctx.shares = needs, shares
        ctx.options, ctx.head = options, head
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
                grad_output, features, weight, bias, target, saved, denominators, *ctx.options, *ctx.head, ctx.needs
            )
        else:
            classifier, local = Classifier(features, weight, bias), target - ctx.shares.first
            gradients = list(
                backward_by_chunks(
                    grad_output, classifier, local, saved, denominators, ctx.options, ctx.head, ctx.needs
                )
            )
        results = [
            _scaled(gradient, factor, features.dtype) if need else None
            for gradient, need in zip(gradients, ctx.needs, strict=True)
        ]
        if ctx.shares is not None and results[0] is not None and len(ctx.shares.sizes) > 1:
            import torch.distributed as dist

            with explained("the sum-reduction of the features' gradient", ctx.shares.group):
                dist.all_reduce(results[0], dist.ReduceOp.SUM, group=ctx.shares.group)
        return *results, None, None, None, None, None, None


def linear_loss(
    shares: ClassShares | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    tables: Tables,
    options: Options,
    head: HeadOptions,
) -> Tensor:
    """The differentiable loss of a linear classifier, or of this rank's share of its classes."""
    needs = tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in (features, weight, bias))
    apply = LinearLoss.apply if shares is None else _apply_eagerly
    return apply(features, weight, bias, target, shares, needs, tables, options, head)


@_disable_dynamo
def _apply_eagerly(*arguments: Any) -> Tensor:
    """For torch.compile, which leaves it alone where ranks exchange something."""
    return LinearLoss.apply(*arguments)


def _gradient_scale(features: Tensor, options: Options) -> float:
    """What gradients that were computed in forward are scaled by until backward, when the loss's own scale is known.

    In float16 the gradients of a mean would underflow: the largest are brought to about 32, by a power of two.
    """
    largest = options.alpha * options.s + options.beta
    if features.dtype != torch.float16 or largest == 0:
        return 1.0
    rows = max(1, len(features)) if options.reduction == MEAN else 1
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
