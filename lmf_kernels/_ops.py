"""The registered ops in `torch.ops.lmf_kernels`: their schemas, fake kernels, derivatives and vmap rules.

Every fused backend has four, with the argument lists of _call.py:

    <backend>_forward(logits, target, *tables, *options) -> (loss, saved, denominators)
    <backend>_backward(grad_output, logits, target, saved, denominators, *options) -> grad_logits
    <backend>_backward_(...) writes the gradient over the logits, and takes labels outside [0, C)
    <backend>_sums(logits, target, first_class, *options) -> sums

with saved (5, rows) = m, c1, c2, g1, g2 of reference.py's eq. 7, denominators (2,) = [LDAM, focal] for 'mean', else
empty, and sums (4, rows) = m, t1, t2, z_y of eq. 1 over these classes. The native ops are defined in csrc/ops.cpp, the
Triton ops here, so that they work without the extension.

The forward ops are differentiable once, in the logits, which is what torch.compile and torch.export need.
"""

import functools
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ._call import MEAN, NONE, Options, Tables, schema_of, unpack
from ._native import _C
from ._versions import triton_problem
from ._vmap import backward_rule, forward_rule
from .math.rows import accumulation_dtype

# Looked up once, at import: torch.compile cannot trace the looking.
no_triton = triton_problem()


class Ops(NamedTuple):
    """The ops of one fused backend, with flat arguments, for graphs."""

    forward: Any
    backward: Any
    backward_: Any
    sums: Any


def triton_kernels() -> Any:
    """Imported at the first call: importing Triton takes most of a second."""
    if no_triton is not None:
        raise RuntimeError(f'backend="triton" is not available: {no_triton}')
    from .triton import launch

    return launch


def _backward_schema(logits: str) -> str:
    return (
        f"(Tensor grad_output, {logits} logits, Tensor target, Tensor saved, Tensor denominators, {schema_of(Options)})"
    )


_library = torch.library.Library("lmf_kernels", "FRAGMENT")
_library.define(
    f"triton_forward(Tensor logits, Tensor target, {schema_of(Tables)}, {schema_of(Options)}) -> "
    "(Tensor loss, Tensor saved, Tensor denominators)"
)
_library.define(f"triton_backward{_backward_schema('Tensor')} -> Tensor")
_library.define(f"triton_backward_{_backward_schema('Tensor(a!)')} -> ()")
_library.define(f"triton_sums(Tensor logits, Tensor target, int first_class, {schema_of(Options)}) -> Tensor")


def _triton_forward(logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return triton_kernels().forward(logits, target, *unpack(arguments, Tables, Options))


def _triton_backward(*arguments: Any) -> Tensor:
    return triton_kernels().backward(*_backward_arguments(arguments))


def _triton_backward_(*arguments: Any) -> None:
    triton_kernels().backward_(*_backward_arguments(arguments))


def _triton_sums(logits: Tensor, target: Tensor, first_class: int, *options: Any) -> Tensor:
    return triton_kernels().sums(logits, target, first_class, Options(*options))


def _backward_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The flat arguments of a backward op with the options as one."""
    grad_output, logits, target, saved, denominators, *options = arguments
    return grad_output, logits, target, saved, denominators, Options(*options)


_library.impl("triton_forward", _triton_forward, "CompositeExplicitAutograd")
_library.impl("triton_backward", _triton_backward, "CompositeExplicitAutograd")
_library.impl("triton_backward_", _triton_backward_, "CompositeExplicitAutograd")
_library.impl("triton_sums", _triton_sums, "CompositeExplicitAutograd")

OPS = {
    name: Ops(*(getattr(torch.ops.lmf_kernels, f"{name}_{op}").default for op in Ops._fields))
    for name in (("triton",) if _C is None else ("triton", "native"))
}


# ---- fake kernels ---------------------------------------------------------------------------------------------------
def _fake_forward(logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_device(logits, target)
    _, options = unpack(arguments, Tables, Options)
    acc = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty(target.shape if options.reduction == NONE else (), dtype=acc),
        logits.new_empty((5, target.numel()), dtype=acc),
        logits.new_empty((2 if options.reduction == MEAN else 0,), dtype=acc),
    )


def _fake_backward(
    grad_output: Tensor, logits: Tensor, target: Tensor, saved: Tensor, denominators: Tensor, *options: Any
) -> Tensor:
    _check_device(logits, target, saved, denominators)
    return torch.empty_like(logits)


def _fake_sums(logits: Tensor, target: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty((4, target.numel()), dtype=accumulation_dtype(logits.dtype))


def _check_device(logits: Tensor, *others: Tensor) -> None:
    # torch runs a fake kernel for any meta tensor among others, and would return what it allocates
    for other in others:
        if other.device != logits.device:
            raise RuntimeError(f"all tensors must be on {logits.device}, got one on {other.device}")


# ---- derivatives ----------------------------------------------------------------------------------------------------
def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, *arguments = inputs
    _, saved, denominators = output
    ctx.mark_non_differentiable(saved, denominators)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, saved, denominators)
    _, ctx.options = unpack(arguments, Tables, Options)
    ctx.without_gradient = [None for _ in inputs[1:]]


def _differentiate(backward: Any, ctx: Any, grad_output: Tensor | None, *unused: None) -> tuple[Any, ...]:
    grad = None if grad_output is None else backward(grad_output, *ctx.saved_tensors, *ctx.options)
    return (grad, *ctx.without_gradient)


def refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"{what}: not supported by the fused kernels of lmf_kernels; do it outside the compiled function, or with "
        'backend="reference", which supports it'
    )


def _refuse_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    refuse("double backward inside torch.compile or through an exported program")


# ---- torch.vmap -----------------------------------------------------------------------------------------------------
def _forward_rule(op: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    def call(logits: Tensor, target: Tensor, tables: Tables, options: Options) -> Any:
        return op(logits, target, *tables, *options)

    def regrouped(logits: Any, target: Any, *rest: Any) -> tuple[Any, ...]:
        return logits, target, *unpack(rest, Tables, Options)

    return forward_rule(call, info.batch_size, regrouped(*in_dims), *regrouped(*arguments))


def _backward_rule(op: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    def call(*arguments: Any) -> Tensor:
        *tensors, options = arguments
        return op(*tensors, *options)

    return backward_rule(call, info.batch_size, _backward_arguments(in_dims), *_backward_arguments(arguments))


for _name, _ops in OPS.items():
    _fakes = Ops(_fake_forward, _fake_backward, lambda *arguments: None, _fake_sums)
    for _step, _fake in zip(Ops._fields, _fakes, strict=True):
        torch.library.register_fake(f"lmf_kernels::{_name}_{_step}", _fake, lib=_library)
    _forward, _backward = f"lmf_kernels::{_name}_forward", f"lmf_kernels::{_name}_backward"
    torch.library.register_autograd(
        _forward, functools.partial(_differentiate, _ops.backward), setup_context=_save_for_op, lib=_library
    )
    torch.library.register_autograd(_backward, _refuse_double_backward, lib=_library)
    torch.library.register_vmap(_forward, functools.partial(_forward_rule, _ops.forward), lib=_library)
    torch.library.register_vmap(_backward, functools.partial(_backward_rule, _ops.backward), lib=_library)
