"""The registered ops, the backend table and the one autograd Function.

Every fused backend is a pair of ops with the same arguments, in `torch.ops.lmf_kernels`:

    <backend>_forward(logits, target, margins, ...) -> (loss, saved, denominators)
    <backend>_backward(grad_output, logits, target, saved, denominators, *options) -> grad_logits

with saved (5, rows) = m, c1, c2, g1, g2 of reference.py's eq. 7 and denominators (2,) = [LDAM, focal] for 'mean', else
empty. The native ops are defined in csrc/lmf.cpp, the Triton ops here, so that they work without the extension.

The forward ops are differentiable once, in the logits, which is what torch.compile and torch.export need; `fused_loss`
is twice, in eager mode, by the autograd Functions below. torch.vmap folds the mapped dimension into N for both.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from ._call import Options, Tables, schema_of
from ._native import _C, BUILD, built, native_problem  # registers the native ops
from ._versions import triton_problem, triton_version
from ._vmap import backward_rule, forward_rule
from .reference import MEAN, NONE, reference_loss
from .row_sums import accumulation_dtype, backward_, slice_sums

BACKENDS = ("auto", "triton", "native", "reference")

_FORWARD_SCHEMA = (
    f"(Tensor logits, Tensor target, {schema_of(Tables)}, {schema_of(Options)}) -> "
    "(Tensor loss, Tensor saved, Tensor denominators)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor logits, Tensor target, Tensor saved, Tensor denominators, "
    f"{schema_of(Options)}) -> Tensor"
)

# Looked up once, at import: torch.compile cannot trace the looking.
no_triton = triton_problem()
HAS_TRITON = no_triton is None
_NO_TRITON = f'backend="triton" is not available: {no_triton}'


def _triton_module() -> Any:
    """Imported at the first call: importing Triton takes most of a second."""
    if not HAS_TRITON:
        raise RuntimeError(_NO_TRITON)
    from . import _triton

    return _triton


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _triton_module().forward(*args)


def _triton_backward(*args: Any) -> Tensor:
    return _triton_module().backward(*args)


def _triton_backward_in_place(*args: Any) -> None:
    arguments = (*args, True)
    _triton_module().backward(*arguments)


def _triton_sums(*args: Any) -> Tensor:
    if not HAS_TRITON:
        raise RuntimeError(_NO_TRITON)
    from . import _triton_sums

    return _triton_sums.sums(*args)


_library = torch.library.Library("lmf_kernels", "FRAGMENT")
_library.define("triton_forward" + _FORWARD_SCHEMA)
_library.define("triton_backward" + _BACKWARD_SCHEMA)
_library.define(
    "triton_backward_" + _BACKWARD_SCHEMA.replace("Tensor logits", "Tensor(a!) logits")[: -len("Tensor")] + "()"
)
_library.define(f"triton_sums(Tensor logits, Tensor target, int first_class, {schema_of(Options)}) -> Tensor")
_library.impl("triton_backward_", _triton_backward_in_place, "CompositeExplicitAutograd")
_library.impl("triton_sums", _triton_sums, "CompositeExplicitAutograd")
_library.impl("triton_forward", _triton_forward, "CompositeExplicitAutograd")
_library.impl("triton_backward", _triton_backward, "CompositeExplicitAutograd")


def _is_plain(argument: Any) -> bool:
    """Whether it is a tensor whose memory holds its values; that of vmap's batched tensors is elsewhere."""
    return type(argument) is Tensor and torch._C._has_storage(argument) and not argument.is_neg()


def _shortest(
    op: Callable[..., Any], implementation: Callable[..., Any], required: int, tensors: int
) -> Callable[..., Any]:
    """The op for eager mode: without its autograd step, which is the Functions'.

    Its first arguments are tensors, `required` and then optional ones, `tensors` in all.

    On plain tensors that is its implementation: the dispatcher would double the host's time. Whoever listens to the
    dispatcher (fake tensors, modes, torch.func) still sees the op; arguments of wrong types need it, too.
    """

    def call(*arguments: Any) -> Any:
        watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
        if (
            not watched
            and all(_is_plain(a) for a in arguments[:required])
            and all(a is None or _is_plain(a) for a in arguments[required:tensors])
            and all(type(a) is float or type(a) is int for a in arguments[tensors:])
        ):
            return implementation(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


# Backend name -> its (forward, backward): the ops, for graphs, and the same by a shorter way, for eager mode.
OPS = {"triton": (torch.ops.lmf_kernels.triton_forward.default, torch.ops.lmf_kernels.triton_backward.default)}
EAGER: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "triton": (_shortest(OPS["triton"][0], _triton_forward, 2, 7), _shortest(OPS["triton"][1], _triton_backward, 5, 5))
}
_native_devices: tuple[str, ...] = ()
if _C is not None:
    OPS["native"] = (torch.ops.lmf_kernels.native_forward.default, torch.ops.lmf_kernels.native_backward.default)
    EAGER["native"] = (_C.native_forward, _C.native_backward)
    _native_devices = tuple(_C.devices())


def _fused(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (OPS if torch.compiler.is_compiling() else EAGER)[backend]


# ---- slices of the classes, for lmf_kernels/linear.py and class_parallel.py -----------------------------------------
# Backend name -> its ops `<backend>_sums` and `<backend>_backward_`.
# A compiler never meets these, as they run inside larger ops or eager code; their fake kernels serve memory estimates.
SLICES: dict[str, tuple[Callable[..., Tensor], Callable[..., None]]] = {"reference": (slice_sums, backward_)}
for _backend in OPS:
    SLICES[_backend] = (
        getattr(torch.ops.lmf_kernels, f"{_backend}_sums").default,
        getattr(torch.ops.lmf_kernels, f"{_backend}_backward_").default,
    )
    torch.library.register_fake(
        f"lmf_kernels::{_backend}_sums",
        lambda logits, target, *rest: logits.new_empty((4, target.numel()), dtype=accumulation_dtype(logits.dtype)),
        lib=_library,
    )
    torch.library.register_fake(f"lmf_kernels::{_backend}_backward_", lambda *arguments: None, lib=_library)


def sums_op(backend: str) -> Callable[..., Tensor]:
    """(logits, target, first_class, *options) -> m, t1, t2, z_y (4, rows) over these classes."""
    return SLICES[backend][0]


def backward_op_(backend: str) -> Callable[..., None]:
    """The backward op of a backend that writes the gradient over the logits, and takes labels outside [0, C)."""
    return SLICES[backend][1]


def extra_copies(backend: str, dtype: torch.dtype) -> int:
    """How many times the memory of a chunk of logits its sums and its gradient take beyond it."""
    if backend in OPS:
        return 0
    # Eager temporaries in the accumulation type, and masks.
    return 3 * (2 if dtype in (torch.float16, torch.bfloat16) else 1)


def _fake_forward(logits: Tensor, target: Tensor, *tables_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_device(logits, target)
    reduction = tables_and_options[-1]
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(target.shape if reduction == NONE else (), dtype=acc),
        logits.new_empty((5, target.numel()), dtype=acc),
        logits.new_empty((2 if reduction == MEAN else 0,), dtype=acc),
    )


def _fake_backward(grad_output: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    _check_device(logits, *rest[:3])
    return torch.empty_like(logits)


def _check_device(logits: Tensor, *others: Tensor) -> None:
    # torch runs a fake kernel for any meta tensor among others, and would return what it allocates
    for other in others:
        if other.device != logits.device:
            raise RuntimeError(f"all tensors must be on {logits.device}, got one on {other.device}")


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, saved, denominators = output
    ctx.mark_non_differentiable(saved, denominators)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], saved, denominators)
    ctx.options = inputs[7:]


def _differentiate(
    backward: Callable[..., Any], ctx: Any, grad_output: Tensor | None, *unused: None
) -> tuple[Any, ...]:
    grad = None if grad_output is None else backward(grad_output, *ctx.saved_tensors, *ctx.options)
    return (grad, *(None,) * 12)


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"{what}: not supported by the fused kernels of lmf_kernels; do it outside the compiled function, or with "
        'backend="reference", which supports it'
    )


def _refuse_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    _refuse("double backward inside torch.compile or through an exported program")


for _backend, (_forward, _backward) in OPS.items():
    _names = f"lmf_kernels::{_backend}_forward", f"lmf_kernels::{_backend}_backward"
    for _name, _fake in zip(_names, (_fake_forward, _fake_backward), strict=True):
        torch.library.register_fake(_name, _fake, lib=_library)
    torch.library.register_autograd(
        _names[0], functools.partial(_differentiate, _backward), setup_context=_save_for_op, lib=_library
    )
    torch.library.register_autograd(_names[1], _refuse_double_backward, lib=_library)
    torch.library.register_vmap(_names[0], functools.partial(forward_rule, _forward), lib=_library)
    torch.library.register_vmap(_names[1], functools.partial(backward_rule, _backward), lib=_library)


def available_backends(device: torch.device) -> tuple[str, ...]:
    """The backends that can run on tensors of `device` in this installation, best first."""
    found = []
    if device.type == "cuda" and HAS_TRITON:
        found.append("triton")
    if device.type in _native_devices:
        found.append("native")
    return (*found, "reference")


def cpu_capability() -> str:
    """The instruction set of the native CPU kernels ("baseline", "avx2", "avx512"), or "none" without them."""
    return "none" if _C is None else _C.cpu_capability()


_BEST = {"cpu": "native", "cuda": "triton"}
_auto_choice = {name: available_backends(torch.device(name))[0] for name in _BEST}
_warned: set[str] = set()  # device types that use another backend for want of the best


def select_backend(backend: str, device: torch.device) -> str:
    """Decides which backend computes the loss of tensors on `device`; the one place that does.

    "auto" takes Triton on CUDA and ROCm tensors, else the native kernels, else (with one warning) the reference.
    Devices that no fused kernel knows (MPS, XPU, meta) use the reference without a warning. An explicit "triton" does
    not look at the device, so that Triton's interpreter can run on CPU tensors.

    Raises:
        RuntimeError: a backend that is not there, with what is missing and how to get it.
    """
    if backend == "auto":
        choice = _auto_choice.get(device.type)
        if choice is None:
            return "reference"
        if choice != _BEST[device.type] and device.type not in _warned and not torch.compiler.is_compiling():
            _warned.add(device.type)
            _warn_of(choice, device)
        return choice
    if backend == "native":
        if device.type not in _native_devices:
            raise RuntimeError(f'backend="native" is not available for {device.type} tensors: {_missing(device)}')
    elif backend == "triton" and not HAS_TRITON:
        raise RuntimeError(_NO_TRITON)
    return backend


def _warn_of(choice: str, device: torch.device) -> None:
    """Says why a device's best backend is not used, unless it is native without any Triton, which was a choice."""
    reasons = [no_triton] if device.type == "cuda" and no_triton else []
    if choice == "reference":
        reasons.append(_missing(device))
        warnings.warn(f"lmf_kernels uses its slow eager reference on {device.type}: {'; '.join(reasons)}", stacklevel=4)
    elif triton_version() is not None:
        warnings.warn(f'lmf_kernels uses backend="{choice}" on {device.type}: {reasons[0]}', stacklevel=4)


def _missing(device: torch.device) -> str:
    if native_problem is not None:
        return f"the compiled extension lmf_kernels._C cannot be used: {native_problem}"
    if device.type == "cuda":
        reason = f" ({built.why_no_cuda})" if built.why_no_cuda else ""
        return (
            f"the extension was built without CUDA{reason}; with a CUDA toolkit, rebuild it: LMF_BUILD_CUDA=1 {BUILD}"
        )
    return "there are no native kernels for this device"


def check_labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises IndexError for a bad label where looking costs no synchronisation: plain CPU tensors in eager mode."""
    if target.device.type != "cpu" or type(target) is not Tensor or torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():  # a label under torch.vmap has no one value
        return
    bad = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bad.any():
        raise IndexError(
            f"target {int(target[bad][0])} is out of bounds: labels must lie in [0, {num_classes}) "
            f"or equal ignore_index={ignore_index}"
        )


class _ReverseMode(torch.autograd.Function):
    """A Function that says so when forward-mode differentiation asks for it."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(
            "forward-mode differentiation (jvp, jacfwd, torch.func.hessian, forward_ad): not supported by the fused "
            'kernels of lmf_kernels; use vjp, jacrev or jacrev of jacrev, or backend="reference", which supports it'
        )


class _FusedLoss(_ReverseMode):
    """The loss of a fused backend, differentiable in the logits; `rest` is backend, target, margins, ...

    What autograd need not look at comes as one argument, since it takes its time over each.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rest: tuple[Any, ...]) -> Tensor:
        backend, *arguments = rest
        loss, saved, denominators = _fused(backend)[0](logits, *arguments)
        _save(ctx, backend, (logits, *arguments), saved, denominators)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _gradient(ctx, grad_output), None


class _TransformableLoss(_ReverseMode):
    """The same in the form that torch.func's transforms ask for, which costs 25 us more a call."""

    @staticmethod
    def forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _fused(backend)[0](*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, saved, denominators = output
        ctx.mark_non_differentiable(saved, denominators)
        ctx.set_materialize_grads(False)
        _save(ctx, inputs[0], inputs[1:], saved, denominators)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        grad = None if grad_output is None else _gradient(ctx, grad_output)
        return (None, grad, *(None,) * 12)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], backend: str, *arguments: Any) -> tuple[Any, Any]:
        return forward_rule(functools.partial(_TransformableLoss.apply, backend), info, in_dims[1:], *arguments)


def _gradient(ctx: Any, grad_output: Tensor) -> Tensor:
    """The gradient in the logits of what `_save` kept; differentiable where the caller asked for that."""
    logits, target, saved, denominators = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if ctx.versions != _versions(ctx.tables):
            raise RuntimeError(
                "margins, class weights or normalizer were modified in place between forward and a backward with "
                "create_graph=True; modify them after it"
            )
        return _FusedGrad.apply(
            ctx.backend, grad_output, logits, target, saved, denominators, *ctx.tables, *ctx.options
        )
    return _fused(ctx.backend)[1](grad_output, logits, target, saved, denominators, *ctx.options)


def _save(ctx: Any, backend: str, arguments: tuple[Any, ...], saved: Tensor, denominators: Tensor) -> None:
    ctx.save_for_backward(arguments[0], arguments[1], saved, denominators)
    # Only double backward needs the tables again. Saving them the usual way would forbid set_weight() between
    # forward and backward, which does not touch the first derivative.
    ctx.tables = arguments[2:7]
    ctx.versions = _versions(ctx.tables)
    ctx.options = arguments[7:]
    ctx.backend = backend


class _FusedGrad(_ReverseMode):
    """The fused backward as a differentiable step: its own derivative is the reference's vector-Jacobian product."""

    @staticmethod
    def forward(
        backend: str,
        grad_output: Tensor,
        logits: Tensor,
        target: Tensor,
        saved: Tensor,
        denominators: Tensor,
        *tables_and_options: Any,
    ) -> Tensor:
        return _fused(backend)[1](grad_output, logits, target, saved, denominators, *tables_and_options[5:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, grad_output, logits, target, *_ = inputs
        ctx.save_for_backward(grad_output, logits, target)
        ctx.tables_and_options = inputs[6:]

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, logits, target = ctx.saved_tensors

        def first_derivative(grad_output: Tensor, logits: Tensor) -> Tensor:
            pull_back = torch.func.vjp(lambda z: reference_loss(z, target, *ctx.tables_and_options), logits)[1]
            return pull_back(grad_output)[0]

        pull_back = torch.func.vjp(first_derivative, grad_output, logits)[1]
        d_grad_output, d_logits = pull_back(grad_grad)
        return (None, d_grad_output, d_logits, *(None,) * 14)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], backend: str, *arguments: Any) -> tuple[Tensor, int]:
        return backward_rule(functools.partial(_FusedGrad.apply, backend), info, in_dims[1:], *arguments)


def _versions(tables: tuple[Tensor | None, ...]) -> list[int]:
    return [-1 if table is None else table._version for table in tables]


def _innermost_transform() -> TransformType:
    return retrieve_current_functorch_interpreter().key()


def fused_loss(backend: str, logits: Tensor, *arguments: Any) -> Tensor:
    """The differentiable loss of a fused backend; the arguments after `backend` are those of its forward op."""
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() and _innermost_transform() == TransformType.Grad:
            _refuse("torch.func.grad, vjp and jacrev inside torch.compile")
        return OPS[backend][0](logits, *arguments)[0]
    if torch._C._are_functorch_transforms_active():
        return _TransformableLoss.apply(backend, logits, *arguments)[0]
    return _FusedLoss.apply(logits, (backend, *arguments))
