"""`DeferredReweighting`: class weights that set in late in training."""

import torch

from .counts import ClassCounts
from .margins import effective_number_weights
from .modules import _Loss
from .sharded.shares import ClassShares


class DeferredReweighting:
    """LDAM's deferred re-weighting (DRW): no class weights at first, effective-number weights from an epoch on.

    Called once per epoch, it sets the weights of `loss` in place::

        w_j = 1                                                                           epoch < self.epoch
        w_j = C * e_j / sum_k e_k,   e_j = (1 - beta) / (1 - beta^n_j)                    epoch >= self.epoch

    In place, so that neither torch.compile nor a captured CUDA graph has anything to redo. The weights depend on the
    epoch's number alone, so a resumed run goes on with the right ones. Without weights the model first learns features
    from the data as they are; LDAM-DRW also divides the learning rate by 100 at the same epoch.

    Args:
        loss: `LMFLoss`, `LDAMLoss`, or a `FocalLoss` built with `weight=torch.ones(C)`. Weights that it was built with
            are replaced.
        cls_num_list: training samples per class, each >= 1, length C, as for `LMFLoss`; of all ranks' classes also
            where the loss holds this rank's share.
        epoch: the first epoch with weights, counted from 0; 160 of 200 in LDAM-DRW.
        beta: in [0, 1); see `effective_number_weights`.
        min_count: as in `LMFLoss`.

    Raises:
        TypeError: `loss` is something else, `epoch` is not an int, or a count is not a number.
        ValueError: a count below 1 (naming the class), counts for another number of classes, `epoch` below 0, `beta`
            outside [0, 1), or a FocalLoss without weights.

    Source: Cao et al. 2019, arXiv 1906.07413; the weights are Cui et al. 2019, arXiv 1901.05555.

    Example:
        >>> criterion = LDAMLoss([500, 80, 9])
        >>> reweight = DeferredReweighting(criterion, [500, 80, 9], epoch=160)
        >>> for epoch in range(200):
        ...     reweight(epoch)  # then train for one epoch
    """

    def __init__(
        self,
        loss: _Loss,
        cls_num_list: ClassCounts,
        epoch: int = 160,
        beta: float = 0.9999,
        *,
        min_count: float | None = None,
    ) -> None:
        if not isinstance(loss, _Loss):
            raise TypeError(f"loss must be an LMFLoss, LDAMLoss or FocalLoss, got {type(loss).__name__}")
        _check_epoch(epoch)
        weight = effective_number_weights(cls_num_list, beta, min_count=min_count)
        current = loss.focal_weight if loss.ldam_weight is None else loss.ldam_weight
        if current is None:
            raise ValueError("loss must be built with class weights: FocalLoss(weight=torch.ones(C))")
        shares = loss.class_group if isinstance(loss.class_group, ClassShares) else None
        num_classes = len(current) if shares is None else shares.total
        if len(weight) != num_classes:
            raise ValueError(f"cls_num_list must hold {num_classes} counts, one a class of loss, got {len(weight)}")
        if shares is not None and len(current) != num_classes:
            weight = weight[shares.first : shares.first + shares.local]
        self.loss = loss
        self.epoch = epoch
        self.weight = weight

    def __call__(self, epoch: int) -> None:
        """Sets the class weights of `epoch`, counted from 0; call it before the epoch's first batch."""
        _check_epoch(epoch)
        self.loss.set_weight(self.weight if epoch >= self.epoch else torch.ones_like(self.weight))


def _check_epoch(epoch: int) -> None:
    if not isinstance(epoch, int) or isinstance(epoch, bool):
        raise TypeError(f"epoch must be an int, got {type(epoch).__name__}")
    if epoch < 0:
        raise ValueError(f"epoch must be >= 0, got {epoch}")
