"""`global_normalizer`: the denominators of 'mean' over data-parallel ranks and accumulated micro-batches."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ._call import Tables
from .math.rows import denominators, read_labels
from .modules import _Loss
from .sharded.shares import ClassShares


def global_normalizer(
    target: Tensor | Sequence[Tensor], loss: _Loss, group: "dist.ProcessGroup | None" = None
) -> tuple[Tensor, Tensor]:
    """The denominators of 'mean' over all ranks and micro-batches, for the argument `normalizer` of the losses.

    'mean' divides the LDAM term by the sum of `ldam_weight[target]` and the focal term by the number of kept samples.
    Both differ from rank to rank and from micro-batch to micro-batch, so a mean of means is not the mean of the joint
    batch. With W ranks this returns::

        ldam  = (1 / W) * sum over ranks and micro-batches of ldam_weight[target], over kept samples
        focal = (1 / W) * number of kept samples of all ranks and micro-batches

    DistributedDataParallel and FSDP2 (`fully_shard`) *average* gradients over the ranks. With the factor 1 / W that
    average is the gradient of the joint batch's 'mean', and the average of the ranks' losses is its value. Where
    gradients are *added* over ranks instead, multiply both denominators by W.

    The sums are all-reduced together, once, and stay on the device: nothing waits for the host.

    Args:
        target: the labels of this rank, (N, ...) int64 or uint8; or a sequence of them, one for each micro-batch of an
            optimiser step with gradient accumulation. The backward passes then add up to the right gradient: do not
            divide by the number of micro-batches.
        loss: the criterion, `LMFLoss`, `LDAMLoss` or `FocalLoss`, on the target's device; its `ldam_weight` and
            `ignore_index` are read. A label outside [0, C) counts as a kept sample of weight 0, as in 'mean'.
        group: the process group; None is the default group, or this process alone where torch.distributed is not
            initialised. All its ranks must call.

    Returns:
        (ldam, focal), 0-dim tensors on the target's device, float64 (float32 on MPS). They are 0 where no sample of any
        rank is kept; the loss is then NaN and its gradient 0, as for 'mean'.

    Raises:
        TypeError: `target` or `loss` is something else.
        ValueError: an empty sequence of targets; a loss that holds this rank's share of the class weights.
        RuntimeError: targets and class weights on different devices.

    Source: the factor 1 / W is the convention of DETR's `num_boxes` (Carion et al. 2020, arXiv 2005.12872).

    Example:
        >>> criterion = LMFLoss([500, 80, 9])
        >>> logits, target = torch.randn(8, 3), torch.randint(0, 3, (8,))
        >>> loss = criterion(logits, target, normalizer=global_normalizer(target, criterion))
    """
    if not isinstance(loss, _Loss):
        raise TypeError(f"loss must be an LMFLoss, LDAMLoss or FocalLoss, got {type(loss).__name__}")
    targets = [target] if isinstance(target, Tensor) else list(target)
    if not targets:
        raise ValueError("target must hold at least one tensor of labels, got an empty sequence")
    packed = torch.stack([_shares(labels, loss) for labels in targets]).sum(0)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(packed, group=group)
        packed = packed / dist.get_world_size(group)
    ldam, focal = packed.unbind()
    return ldam, focal


def _shares(target: Tensor, loss: _Loss) -> Tensor:
    """What one tensor of labels adds to the denominators, (2,) = [LDAM, focal]."""
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.uint8):
        what = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be int64 class indices or a sequence of such tensors, got {what}")
    target = target.long()
    acc = torch.float32 if target.device.type == "mps" else torch.float64
    weight = loss.ldam_weight
    if weight is None:  # FocalLoss, which has no LDAM term
        focal = (target != loss.ignore_index).sum(dtype=acc)
        return torch.stack([focal, focal])
    if weight.device != target.device:
        raise RuntimeError(f"loss must be on target's device {target.device}, got {weight.device}; use loss.to(device)")
    group = loss.class_group
    if isinstance(group, ClassShares) and len(weight) != group.total:
        raise ValueError(f"loss must hold the class weights of all {group.total} classes, got a share of {len(weight)}")
    labels = read_labels(target, len(weight), loss.ignore_index)
    return torch.stack(denominators(labels, weight.to(acc)[labels.y], Tables(), acc))
