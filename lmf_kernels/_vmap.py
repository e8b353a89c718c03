"""torch.vmap over the fused ops: the mapped dimension is folded into N, so that one kernel launch does all of it.

`call` is a kernel of _backends.py or the autograd Function in its place, and takes the same arguments; both rules
return what torch.library.register_vmap and torch.autograd.Function.vmap ask for: the outputs and where their mapped
dimensions are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._call import MEAN, NONE, SUM, Options, Tables


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension first; a tensor that is not mapped repeats."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _one_by_one(call: Callable[..., Any], size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> list[Any]:
    flat, structure = pytree.tree_flatten(arguments)
    dims = pytree.tree_leaves(in_dims)
    return [
        call(
            *pytree.tree_unflatten(
                [a if dim is None else a.select(dim, i) for a, dim in zip(flat, dims, strict=True)], structure
            )
        )
        for i in range(size)
    ]


def forward_rule(
    call: Callable[..., tuple[Tensor, Tensor, Tensor]],
    size: int,
    in_dims: tuple[Any, ...],
    logits: Tensor,
    target: Tensor,
    tables: Tables,
    options: Options,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The vmap rule of a forward op or of what stands for one, `call`.

    One call for 'none' and 'sum'. The sums behind 'mean', and tables that are mapped, need a call for each entry.
    """
    logits_dim, target_dim, table_dims, _ = in_dims
    if options.reduction == MEAN or any(dim is not None for dim in table_dims):
        results = _one_by_one(call, size, in_dims, (logits, target, tables, options))
        return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0, 0, 0)
    logits, target = _mapped_first(logits, logits_dim, size), _mapped_first(target, target_dim, size)
    each = options._replace(reduction=NONE)
    loss, saved, denominators = call(logits.flatten(0, 1), target.flatten(0, 1), tables, each)
    loss = loss.reshape(target.shape)
    saved = saved.reshape(5, size, target[:1].numel())
    return (loss if options.reduction == NONE else loss.flatten(1).sum(1), saved, denominators), (0, 1, None)


def backward_rule(
    call: Callable[..., Tensor],
    size: int,
    in_dims: tuple[Any, ...],
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    denominators: Tensor,
    *rest: Any,
) -> tuple[Tensor, int]:
    """The vmap rule of a backward op or of what stands for one, `call`; folds where `forward_rule` does.

    `rest` is what follows in `call`: the options, after whatever else the caller needs.
    """
    *others, options = rest
    outer_dim, logits_dim, target_dim, saved_dim, _, *rest_dims = in_dims
    if options.reduction == MEAN or any(dim is not None for dim in pytree.tree_leaves(rest_dims)):
        arguments = grad_output, logits, target, saved, denominators, *rest
        return torch.stack(_one_by_one(call, size, in_dims, arguments)), 0
    grad_output, logits = _mapped_first(grad_output, outer_dim, size), _mapped_first(logits, logits_dim, size)
    target, saved = _mapped_first(target, target_dim, size), _mapped_first(saved, saved_dim, size)
    if options.reduction == SUM:
        grad_output = grad_output.reshape(size, *(1,) * (target.dim() - 1)).expand(target.shape)
    folded = (grad_output.flatten(0, 1), logits.flatten(0, 1), target.flatten(0, 1), saved.transpose(0, 1).flatten(1))
    each = options._replace(reduction=NONE)
    return call(*folded, denominators.new_empty(0), *others, each).reshape(logits.shape), 0
