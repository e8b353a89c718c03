"""The differentiable loss of whole rows: the autograd Functions over a backend's kernels.

Differentiable twice in eager mode: the derivative of the fused backward is the reference's vector-Jacobian product.
torch.vmap folds the mapped dimension into N.
"""

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from ._backends import Backend, Kernels
from ._call import Options, Tables
from ._ops import refuse
from ._validate import check_labels, check_memory
from ._vmap import backward_rule, forward_rule
from .math.reference import reference_loss

# What the caller calls logits, target and each of `Tables`.
_GIVEN_AS = ("input", "target", "margins", "ldam_weight", "focal_weight", "normalizer", "normalizer")


def loss_of(backend: Backend, logits: Tensor, target: Tensor, tables: Tables, options: Options) -> Tensor:
    """The loss of logits (N, C, ...) and target (N, ...), differentiable in the logits."""
    if backend.in_graph is None:
        for name, tensor in zip(_GIVEN_AS, (logits, target, *tables), strict=True):
            if tensor is not None:
                check_memory(name, tensor)
        check_labels(target, logits.shape[1], options.ignore_index)
        return reference_loss(logits, target, tables, options)
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() and _innermost_transform() == TransformType.Grad:
            refuse("torch.func.grad, vjp and jacrev inside torch.compile")
        return backend.in_graph.forward(logits, target, tables, options)[0]
    if torch._C._are_functorch_transforms_active():
        return _TransformableLoss.apply(backend, logits, target, tables, options)[0]
    return _FusedLoss.apply(logits, (backend, target, tables, options))


def _innermost_transform() -> TransformType:
    return retrieve_current_functorch_interpreter().key()


def _kernels(backend: Backend) -> Kernels:
    """For backward, which compiled autograd traces; a compiler meets no forward of the Functions below."""
    graph = backend.in_graph
    return graph if graph is not None and torch.compiler.is_compiling() else backend.kernels


class _ReverseMode(torch.autograd.Function):
    """A Function that says so when forward-mode differentiation asks for it."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(
            "forward-mode differentiation (jvp, jacfwd, torch.func.hessian, forward_ad): not supported by the fused "
            'kernels of lmf_kernels; use vjp, jacrev or jacrev of jacrev, or backend="reference", which supports it'
        )


class _FusedLoss(_ReverseMode):
    """The loss of a fused backend.

    What autograd need not look at comes as one argument: it takes its time over each.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: tuple[Backend, Tensor, Tables, Options]) -> Tensor:
        backend, target, tables, options = call
        loss, saved, denominators = backend.kernels.forward(logits, target, tables, options)
        _save(ctx, backend, logits, target, tables, options, saved, denominators)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _gradient(ctx, grad_output), None


class _TransformableLoss(_ReverseMode):
    """The same in the form that torch.func's transforms ask for, which costs 25 us more per call."""

    @staticmethod
    def forward(
        backend: Backend, logits: Tensor, target: Tensor, tables: Tables, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backend.kernels.forward(logits, target, tables, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        backend, logits, target, tables, options = inputs
        _, saved, denominators = output
        ctx.mark_non_differentiable(saved, denominators)
        ctx.set_materialize_grads(False)
        _save(ctx, backend, logits, target, tables, options, saved, denominators)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        grad = None if grad_output is None else _gradient(ctx, grad_output)
        return None, grad, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], backend: Backend, *arguments: Any) -> tuple[Any, Any]:
        call = functools.partial(_TransformableLoss.apply, backend)
        return forward_rule(call, info.batch_size, in_dims[1:], *arguments)


def _save(
    ctx: Any,
    backend: Backend,
    logits: Tensor,
    target: Tensor,
    tables: Tables,
    options: Options,
    saved: Tensor,
    denominators: Tensor,
) -> None:
    ctx.save_for_backward(logits, target, saved, denominators)
    # Only double backward needs the tables again. Saving them the usual way would forbid set_weight() between
    # forward and backward, which does not touch the first derivative.
    ctx.tables = tables
    ctx.versions = _versions(tables)
    ctx.options = options
    ctx.backend = backend


def _gradient(ctx: Any, grad_output: Tensor) -> Tensor:
    """The gradient in the logits of what `_save` kept; differentiable where the caller asked for that."""
    logits, target, saved, denominators = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if ctx.versions != _versions(ctx.tables):
            raise RuntimeError(
                "margins, class weights or normalizer were modified in place between forward and a backward with "
                "create_graph=True; modify them after it"
            )
        return _FusedGrad.apply(ctx.backend, grad_output, logits, target, saved, denominators, ctx.tables, ctx.options)
    return _kernels(ctx.backend).backward(grad_output, logits, target, saved, denominators, ctx.options)


class _FusedGrad(_ReverseMode):
    """The fused backward as a differentiable step: its own derivative is the reference's vector-Jacobian product."""

    @staticmethod
    def forward(
        backend: Backend,
        grad_output: Tensor,
        logits: Tensor,
        target: Tensor,
        saved: Tensor,
        denominators: Tensor,
        tables: Tables,
        options: Options,
    ) -> Tensor:
        return _kernels(backend).backward(grad_output, logits, target, saved, denominators, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, grad_output, logits, target, _, _, ctx.tables, ctx.options = inputs
        ctx.save_for_backward(grad_output, logits, target)

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, logits, target = ctx.saved_tensors

        def first_derivative(grad_output: Tensor, logits: Tensor) -> Tensor:
            pull_back = torch.func.vjp(lambda z: reference_loss(z, target, ctx.tables, ctx.options), logits)[1]
            return pull_back(grad_output)[0]

        pull_back = torch.func.vjp(first_derivative, grad_output, logits)[1]
        d_grad_output, d_logits = pull_back(grad_grad)
        return None, d_grad_output, d_logits, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], backend: Backend, *arguments: Any) -> tuple[Tensor, int]:
        call = functools.partial(_FusedGrad.apply, backend)
        return backward_rule(call, info.batch_size, in_dims[1:], *arguments)


def _versions(tables: Tables) -> list[int]:
    return [-1 if table is None else table._version for table in tables]
