"""The loss of logits whose class axis is spread over ranks.

Each rank reduces its logits to m, t1, t2, z_y per row; one max and one packed sum over the group make them those of
whole rows, from which every rank computes the same loss. Backward needs no communication.
"""

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler, and Triton with it

from .._backends import Backend
from .._call import Options, Tables
from .._validate import check_labels
from ..math.slices import no_sums
from .rows import finish_share
from .shares import ClassShares


class _ShardedLoss(torch.autograd.Function):
    """Differentiable once in this rank's logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: tuple[Backend, ClassShares, Tensor, Tables, Options]) -> Tensor:
        backend, shares, target, tables, options = call
        if shares.local:
            sums = backend.kernels.sums(logits, target, shares.first, options)
        else:
            sums = no_sums(target.numel(), logits)
        loss, saved, denominators = finish_share(shares, sums, target, tables, options)
        ctx.save_for_backward(logits, target, saved, denominators)
        ctx.call = backend, shares, options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative("lmf_loss with class_group")
        backend, shares, options = ctx.call
        logits, target, saved, denominators = ctx.saved_tensors
        if not shares.local:
            return torch.empty_like(logits), None
        local = target - shares.first
        return backend.kernels.backward(grad_output, logits, local, saved, denominators, options), None


def refuse_second_derivative(name: str) -> None:
    """For backward functions: raises where the caller asked for a graph of the gradient."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has no second derivative (backward was called with create_graph=True); lmf_loss of whole logits "
            "has one"
        )


@_disable_dynamo
def sharded_loss(
    backend: Backend, shares: ClassShares, logits: Tensor, target: Tensor, tables: Tables, options: Options
) -> Tensor:
    """The differentiable loss of this rank's share of the logits."""
    if backend.raises_for_labels:
        check_labels(target, shares.total, options.ignore_index)
    return _ShardedLoss.apply(logits, (backend, shares, target, tables, options))
