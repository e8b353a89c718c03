"""Forward, backward and sums on GPU tensors, each one launch of a kernel."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._call import MEAN, NONE, SUM, Options, Tables
from ..math.rows import accumulation_dtype
from .device import Device, device_of
from .kernels import backward_kernel, forward_kernel
from .math import Terms
from .plan import Plan, backward_plan, forward_plan, sums_plan
from .sums import sums_kernel


def forward(logits: Tensor, target: Tensor, tables: Tables, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, saved, denominators) in one launch.

    Logits of any strides are read in place if their dimensions other than C collapse into at most three levels, as
    those of a crop of a batch of images do. Others are copied first.
    """
    device = device_of(logits.device)
    plan = forward_plan(logits.shape, logits.stride(), target.stride(), logits.element_size(), device)
    if plan is None:
        return forward(logits.contiguous(), target.contiguous(), tables, options)
    alpha, beta, gamma, s, ignore_index, reduction = options
    acc = accumulation_dtype(logits.dtype)
    loss = torch.empty(target.shape if reduction == NONE else (), dtype=acc, device=logits.device)
    saved = torch.empty((5, plan.rows), dtype=acc, device=logits.device)
    denominators = torch.empty((2 if reduction == MEAN else 0,), dtype=acc, device=logits.device)
    if reduction == NONE and plan.rows == 0:
        return loss, saved, denominators
    with device.made_current():
        partials = counter = None
        if reduction != NONE or plan.tile.chunk < plan.tile.C:
            partials = torch.empty((4 * plan.programs,), dtype=acc, device=logits.device)
            counter = device.counter()
        tensors = (logits, target, *map(_dense, tables), loss, saved, denominators, partials, counter)
        scalars = alpha, beta, gamma, s, ignore_index, *plan.arguments
        _launch(forward_kernel, device, plan, tensors, scalars, _terms(alpha, beta, s), reduction)
    return loss, saved, denominators


def backward(
    grad_output: Tensor, logits: Tensor, target: Tensor, saved: Tensor, denominators: Tensor, options: Options
) -> Tensor:
    """grad_logits in one launch, in the memory layout of logits."""
    grad_logits = torch.empty_like(logits)
    _write_gradient(grad_logits, grad_output, logits, target, saved, denominators, options)
    return grad_logits


def backward_(
    grad_output: Tensor, logits: Tensor, target: Tensor, saved: Tensor, denominators: Tensor, options: Options
) -> None:
    """The same over the logits."""
    _write_gradient(logits, grad_output, logits, target, saved, denominators, options)


def _write_gradient(
    grad_logits: Tensor,  # may be logits
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    denominators: Tensor,
    options: Options,
) -> None:
    device = device_of(logits.device)
    plan = backward_plan(
        logits.shape, logits.stride(), grad_logits.stride(), target.stride(),
        grad_output.stride() if grad_output.dim() else None, logits.element_size(), device,
    )  # fmt: skip
    if plan is None:
        grad_output, logits, target = grad_output.contiguous(), logits.contiguous(), target.contiguous()
        grad_logits.copy_(backward(grad_output, logits, target, saved, denominators, options))
    elif plan.rows:
        tensors = grad_output, logits, target, saved, denominators, grad_logits
        terms = _terms(options.alpha, options.beta, options.s)
        _launch(backward_kernel, device, plan, tensors, (options.s, *plan.arguments), terms, options.reduction)


def sums(logits: Tensor, target: Tensor, first_class: int, options: Options) -> Tensor:
    """m, t1, t2, z_y (4, rows) over the classes [first_class, first_class + C), in one launch."""
    device = device_of(logits.device)
    plan = sums_plan(logits.shape, logits.stride(), target.stride(), logits.element_size(), device)
    if plan is None:
        return sums(logits.contiguous(), target.contiguous(), first_class, options)
    result = torch.empty((4, plan.rows), dtype=accumulation_dtype(logits.dtype), device=logits.device)
    if plan.rows:
        with device.made_current():
            scalars = first_class, options.ignore_index, options.s, *plan.arguments
            terms = _terms(options.alpha, options.beta, options.s)
            _launch(sums_kernel, device, plan, (logits, target, result), scalars, terms, SUM)
    return result


def _dense(table: Tensor | None) -> Tensor | None:
    return table if table is None or table.is_contiguous() else table.contiguous()


@functools.lru_cache(maxsize=64)
def _terms(alpha: float, beta: float, s: float) -> Terms:
    ldam, focal = alpha != 0, beta != 0
    return Terms(ldam, focal, t1=focal or (ldam and s == 1), t2=ldam and s != 1)


def _check_pointers(tensors: Sequence[Tensor | None]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.numel() and tensor.data_ptr() == 0:
            raise RuntimeError(f"the memory of a tensor of shape {tuple(tensor.shape)} was released")


def _launch(
    kernel: Any,
    device: Device,
    plan: Plan,
    tensors: Sequence[Tensor | None],
    scalars: Sequence[float],
    terms: Terms,
    reduction: int,
) -> None:
    """kernel(*tensors, *scalars), by Triton's own launcher at first and then directly by the kernel it compiled.

    Triton compiles for the plan's integers, for dtypes and for pointers divisible by 16; only that case is kept here.
    """
    variant = (terms, reduction, *(None if tensor is None else tensor.dtype for tensor in tensors))
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if 0 in pointers:
        _check_pointers(tensors)
    aligned = all(pointer is None or pointer % 16 == 0 for pointer in pointers)
    compiled = plan.compiled.get(variant) if aligned else None
    if compiled is not None:
        launch = compiled[(plan.programs, 1, 1)]
        launch(*pointers, *scalars, plan.tile, terms, reduction, stream=device.stream())
        return
    try:
        compiled = kernel[(plan.programs,)](*tensors, *scalars, plan.tile, terms, reduction, **plan.options)
    except (RuntimeError, ValueError) as error:
        if device.on_gpu or not ("active drivers" in str(error) or "cpu tensor" in str(error)):
            raise
        raise RuntimeError(
            f'backend="triton" cannot run on {device.device.type} tensors: move them to a GPU, or set '
            f"TRITON_INTERPRET=1 before Triton is imported to run its interpreter (Triton says: {error})"
        ) from error
    if compiled is not None and aligned:  # the interpreter and the emulator return nothing
        plan.compiled[variant] = compiled
