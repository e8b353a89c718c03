"""The loss of a linear classifier and its gradients, by chunks of its logits. Two ways through:

* One pass, where a chunk holds the whole classes of some rows: its loss and gradients are done at once, and nothing is
  computed twice.
* Two passes, where it does not, or where other ranks hold classes too: the first keeps the rows' sums, joined
  over chunks and ranks; the second makes the logits again (unless one chunk is all) and the gradients from them.
"""

from typing import Any

import torch
from torch import Tensor

from ._ops import EAGER, backward_op_, check_labels, sums_op
from .class_parallel import ClassShares, finish_rows
from .linear_chunks import Head, plan_chunks, steps
from .reference import MEAN, NONE, no_autocast
from .row_sums import Hyper, combine, no_sums, slice_sums


def forward_by_chunks(
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
    """loss, saved, denominators, and `scale` times the gradients of features, weight and bias that are needed."""
    num_classes, device = len(weight), features.device
    if backend != "triton":
        check_labels(target, num_classes if shares is None else shares.total, ignore_index)
    tables, normalizers = (margins, ldam_weight, focal_weight), (ldam_normalizer, focal_normalizer)
    hyper = Hyper(alpha, beta, gamma, s)
    with torch.no_grad(), no_autocast(device.type):
        plan = plan_chunks(len(features), num_classes, features.dtype, backend, memory_budget)
        head = Head(features, weight, bias, normalize, plan, needs)
        outer = torch.full((), scale, dtype=head.acc, device=device)
        if head.whole_rows and shares is None:
            return _one_pass(head, outer, target, tables, normalizers, hyper, ignore_index, reduction, backend)

        sums = no_sums(len(features), features)
        op = sums_op(backend)
        first_class = 0 if shares is None else shares.first
        logits = None
        for rows, classes in head.chunks():
            logits = head.logits(rows, classes)
            part = op(logits, target[rows], first_class + classes.start, *hyper, ignore_index, reduction)
            sums[:, rows] = part if head.whole_rows else combine(sums[:, rows], part, hyper)
        loss, saved, denominators = finish_rows(
            shares, sums, target, tables, normalizers, num_classes, hyper, ignore_index, reduction
        )
        if any(needs):
            if logits is not None and logits.numel() < len(features) * num_classes:
                logits = None  # of the last chunk alone
            _second_pass(
                head,
                logits,
                outer,
                target - first_class,
                saved,
                denominators,
                (*hyper, ignore_index, reduction),
                backend,
            )
        del logits  # and the chunk's memory, before the last temporaries
        return loss, saved, denominators, *head.gradients()


def _one_pass(
    head: Head,
    outer: Tensor,
    target: Tensor,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None],
    normalizers: tuple[Tensor | None, Tensor | None],
    hyper: Hyper,
    ignore_index: int,
    reduction: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `forward_by_chunks`, by chunks of whole rows: the forward op and the gradient of each, one after the other."""
    everything = slice(0, len(head.weight))
    if reduction == MEAN:
        normalizers = _denominators(target, tables[1], normalizers, len(head.weight), ignore_index, head.acc)
    losses, all_saved, denominators = [], [], outer.new_empty(0)
    backward = backward_op_(backend)
    for rows in steps(len(head.features), head.plan.rows) if len(head.features) else (slice(0, 0),):
        logits, labels = head.logits(rows, everything), target[rows]
        arguments = labels, *tables, *normalizers, *hyper, ignore_index, reduction
        loss, saved, denominators = (
            EAGER[backend][0](logits, *arguments) if backend in EAGER else _eager_forward(logits, *arguments)
        )
        losses.append(loss)
        all_saved.append(saved)
        if any(head.needs):
            backward(outer, logits, labels, saved, denominators, *hyper, ignore_index, reduction)
            head.take(logits, rows, everything)
    del logits  # and the chunk's memory, before the last temporaries
    total = torch.cat(losses) if reduction == NONE else torch.stack(losses).sum()
    return total, torch.cat(all_saved, 1), denominators, *head.gradients()


def _eager_forward(logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The fused backends' forward op without a fused backend: (loss, saved, denominators)."""
    tables, normalizers, hyper, (ignore_index, reduction) = (
        arguments[:3], arguments[3:5], Hyper(*arguments[5:9]), arguments[9:]
    )  # fmt: skip
    sums = slice_sums(logits, target, 0, *hyper, ignore_index, reduction)
    return finish_rows(None, sums, target, tables, normalizers, logits.shape[1], hyper, ignore_index, reduction)


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
    head: Head,
    logits: Tensor | None,  # if they are all there
    outer: Tensor,
    target: Tensor,  # counted from the head's first class
    saved: Tensor,
    denominators: Tensor,
    options: tuple[Any, ...],
    backend: str,
) -> None:
    """Gradients from the rows' sums."""
    backward = backward_op_(backend)
    for rows, classes in head.chunks():
        chunk = head.logits(rows, classes) if logits is None else logits
        grad_output = outer[rows] if outer.dim() else outer
        labels, of_rows = target[rows] - classes.start, saved[:, rows].contiguous()
        backward(grad_output, chunk, labels, of_rows, denominators, *options)
        head.take(chunk, rows, classes)
        del chunk


def backward_by_chunks(
    grad_output: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,  # counted from the head's first class
    saved: Tensor,
    denominators: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
    s: float,
    ignore_index: int,
    reduction: int,
    normalize: bool,
    backend: str,
    memory_budget: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of features, weight and bias that are needed."""
    with torch.no_grad(), no_autocast(features.device.type):
        plan = plan_chunks(len(features), len(weight), features.dtype, backend, memory_budget)
        head = Head(features, weight, bias, normalize, plan, needs)
        _second_pass(
            head,
            None,
            grad_output,
            target,
            saved,
            denominators,
            (alpha, beta, gamma, s, ignore_index, reduction),
            backend,
        )
        return head.gradients()
