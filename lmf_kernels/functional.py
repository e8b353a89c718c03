"""`lmf_loss`: where the classes are, validation, and dispatch."""

from torch import Tensor

from ._autograd import loss_of
from ._backends import select_backend
from ._validate import (
    Normalizer,
    Reduction,
    check_logits_and_target,
    check_options,
    check_tables,
    with_normalizer,
    without_tiny_terms,
)
from .sharded.loss import sharded_loss
from .sharded.shares import ClassGroup, is_dtensor, local_logits, shares_of


def lmf_loss(
    input: Tensor,
    target: Tensor,
    *,
    margins: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.5,
    s: float = 30.0,
    weight: Tensor | None = None,
    ldam_weight: Tensor | None = None,
    focal_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: Normalizer | None = None,
    backend: str = "auto",
    class_group: ClassGroup | None = None,
) -> Tensor:
    r"""The LMF loss, alpha * LDAM + beta * focal, in one fused forward and one fused backward kernel.

    For logits z of one sample with target y, p = softmax(z) and margin D = margins[y]::

        LDAM  = -log( exp(s (z_y - D)) / (exp(s (z_y - D)) + sum_{j != y} exp(s z_j)) )
        focal = (1 - p_y)^gamma * (-log p_y)
        loss  = alpha * ldam_weight[y] * LDAM + beta * focal_weight[y] * focal

    Special cases: `alpha=0, gamma=0` or `beta=0, s=1` without margins is cross-entropy, `alpha=0` focal loss, `beta=0`
    LDAM. Loss and gradient keep their relative precision for confident rows, where the formulas above, computed as
    written, return 0 or NaN.

    Args:
        input: unnormalised logits, (C,), (N, C) or (N, C, d1, ..., dk), float16, bfloat16, float32 or float64, of any
            strides; only dimensions d1..dk that do not collapse into one stride are copied first. Never overwritten. A
            single class, whose loss is always 0, warns once.
        target: class indices, (), (N,) or (N, d1, ..., dk), int64 (uint8 is converted by one more kernel launch).
        margins: (C,), the margin of each class, may be negative; None is zeros. See `ldam_margins`.
        alpha: weight of the LDAM term, finite, >= 0.
        beta: weight of the focal term, finite, >= 0.
        gamma: focal exponent, finite, >= 0.
        s: scale of the logits in the LDAM term, finite, > 0. 30 assumes a normalised (cosine) classifier; with 1 the
            LDAM term is the paper's equation 2 to the letter.
        weight: (C,), class weights of both terms; None is ones.
        ldam_weight: (C,), class weights of the LDAM term alone; not together with `weight`.
        focal_weight: (C,), class weights of the focal term alone; not together with `weight`.
        ignore_index: rows with this target have loss 0 and gradient 0 and are not counted; it may lie in [0, C).
        reduction: 'none' keeps the target's shape; 'sum' adds the kept rows; 'mean' divides the LDAM sum by the sum of
            ldam_weight[y] over kept rows (as F.cross_entropy) and the focal sum by the number of kept rows.
        normalizer: replaces the denominators of 'mean': a number > 0, a 0-dim tensor (read on the device), or a pair of
            these for LDAM and focal. For gradient accumulation and global means over data-parallel ranks, where
            `global_normalizer` computes it.
        backend: 'auto', 'triton', 'native' (compiled C++ or CUDA) or 'reference' (eager PyTorch). 'auto' is Triton on
            GPU tensors, else native, else the reference.
        class_group: the process group whose ranks hold the classes between them (docs/many_classes.md): `input` is this
            rank's columns (N, C_local, ...), `target` is the same on all ranks and counts the classes of all ranks, and
            margins and weights are given whole (C,) or as this rank's share (C_local,). Every rank returns the same
            loss and gets the gradient of its own logits. The first call with a group exchanges the ranks' numbers of
            classes and later ones keep them; `ClassShares` serves several heads over one group. DTensor input that
            is sharded on its class axis needs no class_group. Then there is no second derivative.

    Returns:
        The loss: float64 for float64 logits, else float32 (also for half logits). 'mean' without a kept row is NaN,
        with gradient 0. The gradient has the input's dtype and layout.

    Raises:
        ValueError: shapes, ranges, unknown options, `weight` with `ldam_weight` or `focal_weight`, a table that
            requires grad.
        TypeError: dtypes.
        IndexError: a label outside [0, C) that is not `ignore_index`, on the CPU. On a GPU, and from Triton anywhere,
            that row's loss and gradient are NaN instead.
        RuntimeError: tensors on different devices, a backend that is not there, or a collective of class_group that
            failed, within the group's timeout, because another rank did not come to it.

    Source: arXiv 2212.12741, eq. 1 to 3; LDAM: arXiv 1906.07413; focal loss: arXiv 1708.02002.

    Example:
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> target = torch.randint(0, 3, (8,))
        >>> loss = lmf_loss(logits, target, margins=ldam_margins([500, 80, 9]))
        >>> loss.backward()
    """
    options = check_options(alpha, beta, gamma, s, ignore_index, reduction, backend)
    shares = None
    if is_dtensor(input):
        input, target, shares = local_logits(input, target, class_group)
    logits, target = check_logits_and_target(input, target, sharded=class_group is not None or shares is not None)
    num_classes, device = logits.shape[1], input.device
    if class_group is not None:
        shares = shares_of(class_group, num_classes, device)
    whole = None if shares is None else shares.total
    tables = check_tables(margins, weight, ldam_weight, focal_weight, num_classes, device, whole)
    tables, options = with_normalizer(normalizer, tables, options, device)
    options = without_tiny_terms(options, input.dtype)
    chosen = select_backend(backend, device)
    if shares is None:
        loss = loss_of(chosen, logits, target, tables, options)
    else:
        loss = sharded_loss(chosen, shares, logits, target, tables, options)
    return loss.reshape(()) if input.dim() == 1 else loss
