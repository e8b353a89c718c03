"""The loss of a linear classifier and its gradients, by chunks of its logits. Two ways through:

* One pass, where a chunk holds the whole classes of some rows: its loss and gradients are done at once, and nothing is
  computed twice.
* Two passes, where it does not, or where other ranks hold classes too: the first keeps the rows' sums, joined over
  chunks and ranks; the second makes the logits again (unless one chunk is all) and the gradients from them.
"""

import torch
from torch import Tensor

from .._backends import TABLE, Backend
from .._call import MEAN, NONE, Options, Tables
from .._validate import check_labels
from ..math.rows import denominators as denominators_of
from ..math.rows import look_up, no_autocast, read_labels
from ..math.slices import combine, finish, no_sums
from ..sharded.rows import finish_share
from ..sharded.shares import ClassShares
from .call import Classifier, HeadOptions, Needs
from .chunks import Head, plan_chunks, steps


def forward_by_chunks(
    shares: ClassShares | None,
    classifier: Classifier,
    target: Tensor,  # (N,)
    tables: Tables,
    options: Options,
    head_options: HeadOptions,
    scale: float,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, saved, denominators, and `scale` times the gradients of features, weight and bias that are needed."""
    features, weight, _ = classifier
    backend, num_classes = TABLE[head_options.backend], len(weight)
    if backend.raises_for_labels:
        check_labels(target, num_classes if shares is None else shares.total, options.ignore_index)
    with torch.no_grad(), no_autocast(features.device.type):
        head = _head(classifier, head_options, needs)
        outer = torch.full((), scale, dtype=head.acc, device=features.device)
        if head.whole_rows and shares is None:
            return _one_pass(head, outer, target, tables, options, backend)

        sums = no_sums(len(features), features)
        first_class = 0 if shares is None else shares.first
        logits = None
        for rows, classes in head.chunks():
            logits = head.logits(rows, classes)
            part = backend.kernels.sums(logits, target[rows], first_class + classes.start, options)
            sums[:, rows] = part if head.whole_rows else combine(sums[:, rows], part, options)
        if shares is None:
            labels = read_labels(target, num_classes, options.ignore_index)
            of_rows = look_up(tables, labels.y, sums.dtype)
            loss, saved, denominators = finish(sums, labels, of_rows, tables, options)
        else:
            loss, saved, denominators = finish_share(shares, sums, target, tables, options)
        if any(needs):
            if logits is not None and logits.numel() < len(features) * num_classes:
                logits = None  # of the last chunk alone
            _second_pass(head, logits, outer, target - first_class, saved, denominators, options, backend)
        del logits  # and the chunk's memory, before the last temporaries
        return loss, saved, denominators, *head.gradients()


def _head(classifier: Classifier, options: HeadOptions, needs: Needs) -> Head:
    features, weight, bias = classifier
    backend = TABLE[options.backend]
    plan = plan_chunks(len(features), len(weight), features.dtype, backend, options.memory_budget)
    return Head(features, weight, bias, options.normalize, plan, needs)


def _one_pass(
    head: Head, outer: Tensor, target: Tensor, tables: Tables, options: Options, backend: Backend
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `forward_by_chunks`, by chunks of whole rows: the forward op and the gradient of each, one after the other."""
    everything = slice(0, len(head.weight))
    if options.reduction == MEAN:  # of all chunks
        labels = read_labels(target, len(head.weight), options.ignore_index)
        w_ldam = look_up(tables, labels.y, head.acc).w_ldam
        ldam, focal = denominators_of(labels, w_ldam, tables, head.acc)
        tables = tables._replace(ldam_normalizer=ldam, focal_normalizer=focal)
    losses, all_saved, denominators = [], [], outer.new_empty(0)
    for rows in steps(len(head.features), head.plan.rows) if len(head.features) else (slice(0, 0),):
        logits, labels_of = head.logits(rows, everything), target[rows]
        loss, saved, denominators = backend.kernels.forward(logits, labels_of, tables, options)
        losses.append(loss)
        all_saved.append(saved)
        if any(head.needs):
            backend.kernels.backward_(outer, logits, labels_of, saved, denominators, options)
            head.take(logits, rows, everything)
    del logits  # and the chunk's memory, before the last temporaries
    total = torch.cat(losses) if options.reduction == NONE else torch.stack(losses).sum()
    return total, torch.cat(all_saved, 1), denominators, *head.gradients()


def _second_pass(
    head: Head,
    logits: Tensor | None,  # if they are all there
    outer: Tensor,
    target: Tensor,  # counted from the head's first class
    saved: Tensor,
    denominators: Tensor,
    options: Options,
    backend: Backend,
) -> None:
    """Gradients from what the rows saved."""
    for rows, classes in head.chunks():
        chunk = head.logits(rows, classes) if logits is None else logits
        grad_output = outer[rows] if outer.dim() else outer
        labels, of_rows = target[rows] - classes.start, saved[:, rows].contiguous()
        backend.kernels.backward_(grad_output, chunk, labels, of_rows, denominators, options)
        head.take(chunk, rows, classes)
        del chunk


def backward_by_chunks(
    grad_output: Tensor,
    classifier: Classifier,
    target: Tensor,  # counted from the head's first class
    saved: Tensor,
    denominators: Tensor,
    options: Options,
    head_options: HeadOptions,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of features, weight and bias that are needed."""
    with torch.no_grad(), no_autocast(classifier.features.device.type):
        head = _head(classifier, head_options, needs)
        backend = TABLE[head_options.backend]
        _second_pass(head, None, grad_output, target, saved, denominators, options, backend)
        return head.gradients()
