"""torch.vmap over the fused ops: the mapped dimension is folded into N, so that one kernel launch does all of it.

`call` is a raw op or the autograd Function in its place; both rules return what torch.library.register_vmap and
torch.autograd.Function.vmap ask for: the outputs and where their mapped dimensions are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import MEAN, NONE


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension first; a tensor that is not mapped repeats."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _one_by_one(
    call: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> list:
    return [
        call(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    ]


def forward_rule(
    call: Callable[..., tuple[Tensor, Tensor, Tensor]], info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The vmap rule of a forward op or of what stands for one, `call`.

    One call for 'none' and 'sum'. The sums behind 'mean', and tables that are mapped, need a call for each entry.
    """
    size, reduction = info.batch_size, arguments[-1]
    if reduction == MEAN or any(dim is not None for dim in in_dims[2:]):
        results = _one_by_one(call, size, in_dims, arguments)
        return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0, 0, 0)
    logits, target = (_mapped_first(a, dim, size) for a, dim in zip(arguments[:2], in_dims, strict=False))
    loss, saved, denominators = call(logits.flatten(0, 1), target.flatten(0, 1), *arguments[2:-1], NONE)
    loss = loss.reshape(target.shape)
    saved = saved.reshape(5, size, target[:1].numel())
    return (loss if reduction == NONE else loss.flatten(1).sum(1), saved, denominators), (0, 1, None)


def backward_rule(
    call: Callable[..., Tensor], info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Tensor, int]:
    """The vmap rule of a backward op or of what stands for one, `call`; folds where `forward_rule` does."""
    size, denominators = info.batch_size, arguments[4]
    if denominators.numel() or any(dim is not None for dim in in_dims[5:]):
        return torch.stack(_one_by_one(call, size, in_dims, arguments)), 0
    grad_output, logits, target, saved = (
        _mapped_first(a, dim, size) for a, dim in zip(arguments[:4], in_dims, strict=False)
    )
    if grad_output.dim() == 1:  # of a sum
        grad_output = grad_output.reshape(size, *(1,) * (target.dim() - 1)).expand(target.shape)
    folded = (grad_output.flatten(0, 1), logits.flatten(0, 1), target.flatten(0, 1), saved.transpose(0, 1).flatten(1))
    grad = call(*folded, denominators.new_empty(0), *arguments[5:-1], NONE)
    return grad.reshape(logits.shape), 0
