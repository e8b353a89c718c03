"""`linear_lmf_loss`: a linear classifier and the LMF loss together, without the logits in memory.

Logits are made in chunks by torch's matrix products, and the loss part is the kernels on each chunk. Two ways through:

* One pass, where a chunk holds the whole classes of some rows: its loss and gradients are done at once, and nothing is
  computed twice.
* Two passes, where it does not, or where other ranks hold classes too: the first keeps the rows' statistics, joined
  over chunks and ranks; the second makes the logits again (unless one chunk is all) and the gradients from them.

Gradients of the mean and the sum are computed in forward, and backward scales them. Two opaque ops, so that a compiler
neither takes the chunks apart nor keeps them.
"""

import contextlib
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp.autocast_mode import is_autocast_available

from ._ops import EAGER, check_labels, extra_copies, gradient_over_logits_op, select_backend, statistics_op
from .class_parallel import (
    ClassGroup,
    ClassShares,
    explained,
    finish_rows,
    refuse_second_derivative,
    shares_of,
)
from .functional import (
    Normalizer,
    check_floating,
    check_normalizer,
    check_options,
    check_tables,
    check_target,
)
from .reference import MEAN, NONE
from .row_statistics import Hyper, accumulation_dtype, combine, no_statistics, slice_statistics

MEMORY_BUDGET = 64 << 20  # bytes for a chunk of logits and what is computed from it
FEWEST_ROWS = 64  # of a chunk of whole rows: with fewer, matrix products wait for the weight from memory
MOST_ROWS = 4096  # of a chunk of a part of the classes
# Bytes of temporaries that are as wide as the features. Larger on GPUs, where each product is a launch; on CPUs mixed
# dtypes in one operation cost a hidden copy in the wider one.
CPU_SLICE, GPU_SLICE = 2 << 20, 16 << 20
EPS = 1e-12  # as F.normalize's


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
    reduction: str = "mean",
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
            is allocated: the statistics (5 numbers a row), and with `normalize` the normalised features.
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
    code = check_options(alpha, beta, gamma, s, ignore_index, reduction, backend)
    target = check_target(target)
    _check_linear(input, linear_weight, linear_bias, target, class_group is not None)
    device, num_classes = input.device, linear_weight.shape[0]
    shares = None if class_group is None else shares_of(class_group, num_classes, device)
    ldam_weight, focal_weight = check_tables(margins, weight, ldam_weight, focal_weight, num_classes, device, shares)
    alpha, beta, code, ldam_normalizer, focal_normalizer = check_normalizer(normalizer, alpha, beta, code, device)
    if memory_budget is not None and (type(memory_budget) is not int or memory_budget <= 0):
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget!r}")
    chosen = select_backend(backend, device)

    if is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):  # as F.linear there
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
    with _no_autocast(device):
        features = F.normalize(input, dim=-1, eps=EPS) if normalize else input
        if input.dim() == 1:
            features, target = features.unsqueeze(0), target.unsqueeze(0)
        needs = tuple(
            t is not None and t.requires_grad and torch.is_grad_enabled()
            for t in (features, linear_weight, linear_bias)
        )
        apply = _LinearLoss.apply if shares is None else _apply_sharded
        loss = apply(
            needs, shares, features, linear_weight, linear_bias, target, margins, ldam_weight, focal_weight,
            ldam_normalizer, focal_normalizer, float(alpha), float(beta), float(gamma), float(s), ignore_index, code,
            normalize, chosen, memory_budget or 0,
        )  # fmt: skip
    return loss.reshape(()) if input.dim() == 1 else loss


def _check_linear(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, sharded: bool
) -> None:
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
    if linear_weight.shape[0] == 0 and not sharded:
        raise ValueError("linear_weight must have at least one class, got shape " + str(tuple(linear_weight.shape)))
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"linear_bias must have shape ({linear_weight.shape[0]},), one value a class, "
            f"got {tuple(linear_bias.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have shape {tuple(input.shape[:-1])} for input of shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
    if target.device != input.device:
        raise RuntimeError(f"target must be on input's device {input.device}, got {target.device}")


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()


# ---- chunks ---------------------------------------------------------------------------------------------------------
class _Plan(NamedTuple):
    """How many rows and classes a chunk of logits has at most; classes = C means whole rows."""

    rows: int
    classes: int


def _plan(rows: int, num_classes: int, dtype: torch.dtype, backend: str, budget: int) -> _Plan:
    """The default budget grows with the logits, so that their chunks never become many."""
    budget = budget or max(MEMORY_BUDGET, rows * num_classes * dtype.itemsize // 32)
    elements = max(1, budget // (dtype.itemsize * (1 + extra_copies(backend, dtype))))
    whole = elements // max(num_classes, 1)
    if whole >= min(rows, FEWEST_ROWS):
        return _Plan(_even(rows, whole), num_classes)
    some = _even(rows, min(MOST_ROWS, max(FEWEST_ROWS, elements // 1024)))
    return _Plan(some, _even(num_classes, max(1, elements // some)))


def _even(size: int, most: int) -> int:
    """The step that cuts `size` into as few steps of at most `most` as possible, of nearly equal size."""
    return -(-size // -(-size // most)) if size else 1


def _steps(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, max(step, 1)):
        yield slice(start, min(size, start + step))


class _Head:
    """The classifier: makes chunks of logits and takes their gradients, into those that are needed."""

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        normalize: bool,
        plan: _Plan,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.features, self.weight, self.bias, self.plan = features, weight, bias, plan
        self.needs = needs
        self.half = features.dtype in (torch.float16, torch.bfloat16)
        self.acc = accumulation_dtype(features.dtype)
        self.whole_rows = plan.classes >= weight.shape[0]
        self.buffer = features.new_empty(min(plan.rows, len(features)) * min(plan.classes, len(weight)))
        self.slice_bytes = CPU_SLICE if features.device.type == "cpu" else GPU_SLICE
        self.width = max(1, self.slice_bytes // (weight.element_size() * max(weight.shape[1], 1)))  # classes of a slice
        self.norms = self.inverse = None
        if normalize:
            self.norms = weight.new_empty(len(weight), dtype=self.acc)
            for part in _steps(len(weight), self.width):
                torch.linalg.vector_norm(weight[part], dim=1, dtype=self.acc, out=self.norms[part])
            self.inverse = self.norms.clamp_min(EPS).reciprocal()
        # A weight gradient of half products adds up in float32, as do features' gradients over chunks of classes.
        self.grad_features = self.grad_weight = self.grad_bias = None
        if needs[0]:
            dtype = features.dtype if self.whole_rows else self.acc
            self.grad_features = torch.zeros_like(features, dtype=dtype, memory_format=torch.contiguous_format)
        if needs[1]:
            self.grad_weight = torch.zeros_like(weight, dtype=self.acc, memory_format=torch.contiguous_format)
        if needs[2]:
            self.grad_bias = torch.zeros_like(weight[:, 0], dtype=self.acc)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        for rows in _steps(len(self.features), self.plan.rows):
            for classes in _steps(len(self.weight), self.plan.classes):
                yield rows, classes

    def logits(self, rows: slice, classes: slice) -> Tensor:
        features, weight = self.features[rows], self.weight[classes]
        logits = self.buffer[: len(features) * len(weight)].view(len(features), len(weight))
        if self.bias is not None and self.inverse is None:
            return torch.addmm(self.bias[classes], features, weight.t(), out=logits)
        torch.mm(features, weight.t(), out=logits)
        if self.inverse is not None:
            self._scale(logits, classes)
            if self.bias is not None:
                logits += self.bias[classes]
        return logits

    def _scale(self, logits: Tensor, classes: slice) -> None:
        """Divides the columns by the norms of the weights; a slice at a time where that takes a wider copy."""
        assert self.inverse is not None
        inverse = self.inverse[classes]
        step = max(1, self.slice_bytes // (4 * max(len(logits), 1))) if self.half else len(inverse)
        for part in _steps(len(inverse), step):
            logits[:, part].mul_(inverse[part])

    def take(self, gradient: Tensor, rows: slice, classes: slice) -> None:
        """Adds the gradients from a chunk's gradient, which may be overwritten."""
        features, weight = self.features[rows], self.weight[classes]
        if self.grad_bias is not None:
            self.grad_bias[classes] += gradient.sum(0, dtype=self.acc)
        if self.inverse is not None:
            self._scale(gradient, classes)
        if self.grad_weight is not None:
            total = self.grad_weight[classes]
            if self.half:  # a product adds up in float32 inside and is rounded once
                for part in _steps(len(weight), self.width):
                    total[part] += gradient[:, part].t() @ features
            else:
                total.addmm_(gradient.t(), features)
        if self.grad_features is not None:
            total = self.grad_features[rows]
            if self.whole_rows:
                torch.mm(gradient, weight, out=total)
            elif self.half:
                total += gradient @ weight
            else:
                total.addmm_(gradient, weight)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of features, weight and bias, each empty where it is not needed; the last call."""
        nothing = self.features.new_empty(0)
        self.buffer = nothing
        if self.grad_weight is not None and self.norms is not None and self.inverse is not None:
            # d (W / |W|): what is left of the gradient beside W's own direction. Below EPS the norm is a constant.
            square = torch.where(self.norms > EPS, self.inverse * self.inverse, 0.0)
            for part in _steps(len(self.weight), self.width):
                total, weight = self.grad_weight[part], self.weight[part].to(self.acc)
                along = (total * weight).sum(1).mul_(square[part])
                total.addcmul_(weight, along[:, None], value=-1)
        return (
            nothing.clone() if self.grad_features is None else self.grad_features.to(self.features.dtype),
            nothing.to(self.acc, copy=True) if self.grad_weight is None else self.grad_weight,
            nothing.to(self.acc, copy=True) if self.grad_bias is None else self.grad_bias,
        )


# ---- forward and backward -------------------------------------------------------------------------------------------
def _forward(
    shares: ClassShares | None,
    features: Tensor,  # (N, D)
    weight: Tensor,  # (C, D)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (N,)
    margins: Tensor | None,
    ldam_weight: Tensor | None,
    focal_weight: Tensor | None,
    ldam_normalizer: Tensor | None,
    focal_normalizer: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    s: float,
    ignore_index: int,
    reduction: int,
    normalize: bool,
    backend: str,
    memory_budget: int,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, stats, denominators, and `scale` times the gradients of features, weight and bias that are needed."""
    num_classes, device = len(weight), features.device
    if backend != "triton":
        check_labels(target, num_classes if shares is None else shares.total, ignore_index)
    tables, normalizers = (margins, ldam_weight, focal_weight), (ldam_normalizer, focal_normalizer)
    hyper = Hyper(alpha, beta, gamma, s)
    with torch.no_grad(), _no_autocast(device):
        plan = _plan(len(features), num_classes, features.dtype, backend, memory_budget)
        head = _Head(features, weight, bias, normalize, plan, needs)
        outer = torch.full((), scale, dtype=head.acc, device=device)
        if head.whole_rows and shares is None:
            return _one_pass(head, outer, target, tables, normalizers, hyper, ignore_index, reduction, backend)

        statistics = no_statistics(len(features), features)
        op = statistics_op(backend)
        first_class = 0 if shares is None else shares.first
        logits = None
        for rows, classes in head.chunks():
            logits = head.logits(rows, classes)
            part = op(logits, target[rows], first_class + classes.start, ignore_index, alpha, beta, s)
            statistics[:, rows] = part if head.whole_rows else combine(statistics[:, rows], part, hyper)
        loss, stats, denominators = finish_rows(
            shares, statistics, target, tables, normalizers, num_classes, hyper, ignore_index, reduction
        )
        if any(needs):
            if logits is not None and logits.numel() < len(features) * num_classes:
                logits = None  # of the last chunk alone
            _second_pass(head, logits, outer, target - first_class, stats, denominators, hyper, backend)
        del logits  # and the chunk's memory, before the last temporaries
        return loss, stats, denominators, *head.gradients()


def _one_pass(
    head: _Head,
    outer: Tensor,
    target: Tensor,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None],
    normalizers: tuple[Tensor | None, Tensor | None],
    hyper: Hyper,
    ignore_index: int,
    reduction: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_forward`, by chunks of whole rows: the forward op and the gradient of each, one after the other."""
    alpha, beta, _, s = hyper
    everything = slice(0, len(head.weight))
    if reduction == MEAN:
        normalizers = _denominators(target, tables[1], normalizers, len(head.weight), ignore_index, head.acc)
    losses, all_stats, denominators = [], [], outer.new_empty(0)
    backward = gradient_over_logits_op(backend)
    for rows in _steps(len(head.features), head.plan.rows) if len(head.features) else (slice(0, 0),):
        logits, labels = head.logits(rows, everything), target[rows]
        arguments = labels, *tables, *normalizers, *hyper, ignore_index, reduction
        loss, stats, denominators = (
            EAGER[backend][0](logits, *arguments) if backend in EAGER else _eager_forward(logits, *arguments)
        )
        losses.append(loss)
        all_stats.append(stats)
        if any(head.needs):
            backward(outer, logits, labels, stats, denominators, alpha, beta, s)
            head.take(logits, rows, everything)
    del logits  # and the chunk's memory, before the last temporaries
    total = torch.cat(losses) if reduction == NONE else torch.stack(losses).sum()
    return total, torch.cat(all_stats, 1), denominators, *head.gradients()


def _eager_forward(logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The fused backends' forward op without a fused backend: (loss, stats, denominators)."""
    tables, normalizers, hyper, (ignore_index, reduction) = (
        arguments[:3], arguments[3:5], Hyper(*arguments[5:9]), arguments[9:]
    )  # fmt: skip
    statistics = slice_statistics(logits, target, 0, ignore_index, hyper.alpha, hyper.beta, hyper.s)
    return finish_rows(None, statistics, target, tables, normalizers, logits.shape[1], hyper, ignore_index, reduction)


def _denominators(
    target: Tensor,
    ldam_weight: Tensor | None,
    normalizers: tuple[Tensor | None, Tensor | None],
    num_classes: int,
    ignore_index: int,
    acc: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What 'mean' divides by, which needs no logits."""
    ldam, focal = normalizers
    kept = target != ignore_index
    if ldam is None:
        valid = kept & (target >= 0) & (target < num_classes)
        weights = valid if ldam_weight is None else torch.where(valid, ldam_weight[torch.where(valid, target, 0)], 0)
        ldam = weights.sum(dtype=acc)
    return ldam, kept.sum(dtype=acc) if focal is None else focal


def _second_pass(
    head: _Head,
    logits: Tensor | None,  # if they are all there
    outer: Tensor,
    target: Tensor,  # counted from the head's first class
    stats: Tensor,
    denominators: Tensor,
    hyper: Hyper,
    backend: str,
) -> None:
    """Gradients from the rows' statistics."""
    backward = gradient_over_logits_op(backend)
    for rows, classes in head.chunks():
        chunk = head.logits(rows, classes) if logits is None else logits
        grad_output = outer[rows] if outer.dim() else outer
        labels, of_rows = target[rows] - classes.start, stats[:, rows].contiguous()
        backward(grad_output, chunk, labels, of_rows, denominators, hyper.alpha, hyper.beta, hyper.s)
        head.take(chunk, rows, classes)
        del chunk


def _backward(
    grad_output: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,  # counted from the head's first class
    stats: Tensor,
    denominators: Tensor,
    alpha: float,
    beta: float,
    s: float,
    normalize: bool,
    backend: str,
    memory_budget: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of features, weight and bias that are needed."""
    with torch.no_grad(), _no_autocast(features.device):
        plan = _plan(len(features), len(weight), features.dtype, backend, memory_budget)
        head = _Head(features, weight, bias, normalize, plan, needs)
        _second_pass(head, None, grad_output, target, stats, denominators, Hyper(alpha, beta, 0.0, s), backend)
        return head.gradients()


_library = torch.library.Library("lmf_kernels", "FRAGMENT")
_HEAD = "Tensor features, Tensor weight, Tensor? bias, Tensor target"
_GRADIENTS = "Tensor grad_features, Tensor grad_weight, Tensor grad_bias"
_library.define(
    f"linear_forward({_HEAD}, Tensor? margins, Tensor? ldam_weight, Tensor? focal_weight, Tensor? ldam_normalizer, "
    "Tensor? focal_normalizer, float alpha, float beta, float gamma, float s, int ignore_index, int reduction, "
    "bool normalize, str backend, int memory_budget, float scale, bool[] needs) -> "
    f"(Tensor loss, Tensor stats, Tensor denominators, {_GRADIENTS})"
)
_library.define(
    f"linear_backward(Tensor grad_output, {_HEAD}, Tensor stats, Tensor denominators, float alpha, float beta, "
    f"float s, bool normalize, str backend, int memory_budget, bool[] needs) -> ({_GRADIENTS})"
)
_library.impl("linear_forward", lambda *arguments: _forward(None, *arguments), "CompositeExplicitAutograd")
_library.impl("linear_backward", _backward, "CompositeExplicitAutograd")


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


class _LinearLoss(torch.autograd.Function):
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
        alpha, beta, _, s, _, reduction, normalize, backend, memory_budget = arguments[5:]
        now = needs if reduction != NONE else (False,) * 3
        scale = _gradient_scale(features, alpha, beta, s, reduction) if any(now) else 1.0
        arguments = features, weight, bias, target, *arguments, scale, now
        if shares is None:
            loss, stats, denominators, *gradients = torch.ops.lmf_kernels.linear_forward(*arguments)
        else:
            loss, stats, denominators, *gradients = _forward(shares, *arguments)
        saved = gradients if any(now) and torch.compiler.is_compiling() else []
        ctx.save_for_backward(features, weight, bias, target, stats, denominators, *saved)
        # Not among the saved tensors: the first backward scales them in place and gives them away.
        ctx.gradients = gradients if any(now) and not saved else None
        ctx.scale = scale
        ctx.needs, ctx.shares = needs, shares
        ctx.options = alpha, beta, s, normalize, backend, memory_budget
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_lmf_loss")
        features, weight, bias, target, stats, denominators, *gradients = ctx.saved_tensors
        factor = None
        if ctx.gradients is not None:
            gradients, ctx.gradients = ctx.gradients, None
        if gradients:
            factor = grad_output / ctx.scale
        elif ctx.shares is None:
            gradients = torch.ops.lmf_kernels.linear_backward(
                grad_output, features, weight, bias, target, stats, denominators, *ctx.options, ctx.needs
            )
        else:
            target = target - ctx.shares.first
            arguments = grad_output, features, weight, bias, target, stats, denominators, *ctx.options, ctx.needs
            gradients = list(_backward(*arguments))
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
def _apply_sharded(*arguments: Any) -> Tensor:
    return _LinearLoss.apply(*arguments)


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
    for part in _steps(len(gradient), GPU_SLICE // row):
        result[part] = gradient[part] if factor is None else gradient[part] * factor
    return result
