"""`LMFLoss`, `LDAMLoss` and `FocalLoss`: modules over `lmf_loss`."""

import torch
from torch import Tensor, nn

from ._hints import module_misfit
from ._state import ClassBuffers
from ._validate import Normalizer, Reduction, check_dense, check_memory, check_options, check_table, class_weights
from .counts import ClassCounts, check_counts, read_counts
from .functional import lmf_loss
from .margins import check_max_m, ldam_margins, margins_from_rarest
from .sharded.shares import ClassGroup, ClassShares, explained


class _Loss(ClassBuffers):
    """What the three losses share: options as attributes, and the call."""

    def __init__(
        self,
        *,
        margins: Tensor | None,
        weights: dict[str, Tensor | None],
        alpha: float,
        beta: float,
        gamma: float,
        s: float,
        ignore_index: int,
        reduction: Reduction,
        backend: str,
        class_group: ClassGroup | None,
    ) -> None:
        super().__init__(margins, weights)
        check_options(alpha, beta, gamma, s, ignore_index, reduction, backend)
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.s = s
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.backend = backend
        self.class_group = class_group

    def _shares(self, num_local: int, device: torch.device) -> ClassGroup | None:
        """The ranks' shares of the classes, exchanged at the first call; a module keeps its own."""
        group = self.class_group
        if group is not None and not isinstance(group, ClassShares):
            self.class_group = group = ClassShares(group, num_local, device)
        return group

    @torch.jit.unused  # so that torch.jit.script takes a model that holds the loss and leaves it out
    def forward(self, input: Tensor, target: Tensor, normalizer: Normalizer | None = None) -> Tensor:
        """The loss of logits `input` (N, C, ...) and labels `target` (N, ...); see `lmf_loss`."""
        buffers = self._buffers  # three times quicker than the attributes, which matters for small batches
        try:
            return lmf_loss(
                input,
                target,
                margins=buffers["margins"],
                alpha=self.alpha,
                beta=self.beta,
                gamma=self.gamma,
                s=self.s,
                ldam_weight=buffers["ldam_weight"],
                focal_weight=buffers["focal_weight"],
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                normalizer=normalizer,
                backend=self.backend,
                class_group=self.class_group and self._shares(input.shape[input.dim() > 1], input.device),
            )
        except (ValueError, RuntimeError) as error:
            self._explain(error, input)
            raise

    def _misfit(self, input: Tensor) -> Exception | None:
        """How logits do not fit this loss, in the words of its constructor."""
        if self.class_group is not None or type(input) not in (Tensor, nn.Parameter):
            return None
        built_from = "weight" if self.margins is None else "cls_num_list"
        return module_misfit(type(self).__name__, built_from, self._buffers, input)

    def extra_repr(self) -> str:
        options = [f"alpha={self.alpha:g}", f"beta={self.beta:g}"]
        if self.beta:
            options.append(f"gamma={self.gamma:g}")
        if self.alpha:
            options.append(f"s={self.s:g}")
        if self.margins is not None:
            options.insert(0, f"classes={len(self.margins)}")
        return ", ".join([*options, f"reduction={self.reduction!r}", f"backend={self.backend!r}"])


class LMFLoss(_Loss):
    r"""The LMF loss, a drop-in for `nn.CrossEntropyLoss` on imbalanced data: alpha * LDAM + beta * focal.

    For logits z of one sample with target y, p = softmax(z), and margins D from the class counts n::

        D_j   = max_m * n_j^(-1/4) / max_k n_k^(-1/4)
        LDAM  = -log( exp(s (z_y - D_y)) / (exp(s (z_y - D_y)) + sum_{j != y} exp(s z_j)) )
        focal = (1 - p_y)^gamma * (-log p_y)
        loss  = alpha * ldam_weight[y] * LDAM + beta * focal_weight[y] * focal

    computed by one fused forward and one fused backward kernel.

    The defaults are the paper's (alpha = beta = 1, gamma 1.5) and LDAM's (max_m 0.5, s 30). s = 30 assumes the
    normalised (cosine) classifier of LDAM-DRW, whose logits lie in [-1, 1]; after a plain linear layer it acts like a
    larger learning rate (docs/choosing.md). s = 1 is the paper's equation 2 to the letter.

    Args:
        cls_num_list: training samples per class, each >= 1, length C: a list, tuple, array or tensor, as `class_counts`
            makes; or a dict, Counter or pandas Series, whose keys or index are the class indices 0..C-1, in any order.
        alpha: weight of the LDAM term, finite, >= 0.
        beta: weight of the focal term, finite, >= 0.
        gamma: focal exponent, finite, >= 0.
        max_m: the margin of the rarest class, in units of logits.
        s: scale of the logits in the LDAM term, finite, > 0.
        weight: (C,), class weights of both terms; None is ones.
        ldam_weight: (C,), class weights of the LDAM term alone; not together with `weight`.
        focal_weight: (C,), class weights of the focal term alone; not together with `weight`.
        ignore_index: samples with this target have loss 0 and gradient 0 and are not counted.
        reduction: 'none', 'sum' or 'mean' (LDAM: weighted mean as in F.cross_entropy; focal: mean over kept samples).
        backend: 'auto', 'triton', 'native' or 'reference'; see `lmf_loss`.
        class_group: the process group whose ranks hold the classes between them, or `ClassShares`; see `lmf_loss`.
            cls_num_list and the weights are those of all classes on every rank. With `ClassShares`, where building the
            loss exchanges the count of the rarest class, they may all be this rank's share instead, on every rank.
        min_count: classes with fewer training samples, or none, count as this many, at least 1; None makes classes
            without samples an error.

    Attributes:
        margins, ldam_weight, focal_weight: buffers of shape (C,), or of the share that was given; `set_weight` changes
            the weights in place. state_dict has what nn.CrossEntropyLoss's would: weights that were given or set, under
            these names, and never margins, which follow from cls_num_list.

    Shape:
        input: logits (C,), (N, C) or (N, C, d1, ..., dk) in float16, bfloat16, float32 or float64.
        target: class indices (), (N,) or (N, d1, ..., dk), int64.
        normalizer: optional third argument; replaces the denominators of 'mean' (see `lmf_loss`).
        output: 0-dim, or the target's shape for 'none'; float32 (float64 for float64 input).

    Raises:
        ValueError: a count below 1 (naming the class), keys or an index that are not 0..C-1, an option out of range,
            `weight` with `ldam_weight` or `focal_weight`, shapes that do not fit.
        TypeError: wrong dtypes.

    Source: arXiv 2212.12741 (LMF), arXiv 1906.07413 (LDAM), arXiv 1708.02002 (focal loss).

    Example:
        >>> criterion = LMFLoss([4693, 779, 769, 360, 229, 100, 81])
        >>> loss = criterion(torch.randn(16, 7, requires_grad=True), torch.randint(0, 7, (16,)))
        >>> loss.backward()
    """

    def __init__(
        self,
        cls_num_list: ClassCounts,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.5,
        max_m: float = 0.5,
        s: float = 30.0,
        weight: Tensor | None = None,
        ldam_weight: Tensor | None = None,
        focal_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: str = "auto",
        class_group: ClassGroup | None = None,
        min_count: float | None = None,
    ) -> None:
        margins = _margins(cls_num_list, max_m, class_group, min_count)
        ldam_weight, focal_weight = class_weights(weight, ldam_weight, focal_weight, len(margins))
        super().__init__(
            margins=margins,
            weights={
                "ldam_weight": _copy("ldam_weight", ldam_weight),
                "focal_weight": _copy("focal_weight", focal_weight),
            },
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            s=s,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=backend,
            class_group=class_group,
        )


class LDAMLoss(_Loss):
    r"""The LDAM loss: cross-entropy of scaled logits with a margin that is larger for rarer classes.

    For logits z of one sample with target y and margins D from the class counts n::

        D_j  = max_m * n_j^(-1/4) / max_k n_k^(-1/4)
        loss = -weight[y] * log( exp(s (z_y - D_y)) / (exp(s (z_y - D_y)) + sum_{j != y} exp(s z_j)) )

    `LMFLoss` with beta = 0: one exponential a logit. The arguments, shapes, dtypes and errors are those of `LMFLoss`;
    `set_weight` serves deferred re-weighting. s = 30 assumes a normalised (cosine) classifier.

    Args:
        cls_num_list: training samples per class, each >= 1, length C, in any form that `LMFLoss` takes.
        max_m: the margin of the rarest class, in units of logits.
        s: scale of the logits, finite, > 0.
        weight: (C,), class weights; None is ones.
        ignore_index: samples with this target have loss 0 and gradient 0 and are not counted.
        reduction: 'none', 'sum' or 'mean' (weighted mean, as in F.cross_entropy).
        backend: 'auto', 'triton', 'native' or 'reference'.
        class_group, min_count: as in `LMFLoss`.

    Raises:
        ValueError, TypeError: as `LMFLoss`.

    Source: Cao et al. 2019, arXiv 1906.07413.
    """

    def __init__(
        self,
        cls_num_list: ClassCounts,
        *,
        max_m: float = 0.5,
        s: float = 30.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: str = "auto",
        class_group: ClassGroup | None = None,
        min_count: float | None = None,
    ) -> None:
        margins = _margins(cls_num_list, max_m, class_group, min_count)
        if weight is not None:
            check_table("weight", weight, len(margins))
        super().__init__(
            margins=margins,
            weights={"ldam_weight": _copy("weight", weight)},
            alpha=1.0,
            beta=0.0,
            gamma=0.0,
            s=s,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=backend,
            class_group=class_group,
        )


class FocalLoss(_Loss):
    r"""The multi-class focal loss on softmax probabilities: loss = -weight[y] * (1 - p_y)^gamma * log p_y.

    p = softmax(z) is never weighted. `LMFLoss` with alpha = 0: one exponential a logit, and exact gradients for
    confident samples and for gamma < 1, where (1 - p)^(gamma - 1) would be NaN. The shapes, dtypes and errors are
    those of `LMFLoss`.

    Args:
        gamma: focal exponent, finite, >= 0; 0 is cross-entropy.
        weight: (C,), class weights; None is ones (and leaves nothing for `set_weight` to change).
        ignore_index: samples with this target have loss 0 and gradient 0 and are not counted.
        reduction: 'none', 'sum' or 'mean' (over the number of kept samples, also with weights).
        backend: 'auto', 'triton', 'native' or 'reference'.
        class_group: as in `LMFLoss`.

    Raises:
        ValueError, TypeError: as `LMFLoss`.

    Source: Lin et al. 2017, arXiv 1708.02002.
    """

    def __init__(
        self,
        *,
        gamma: float = 1.5,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: str = "auto",
        class_group: ClassGroup | None = None,
    ) -> None:
        if weight is not None:
            check_table("weight", weight, _num_classes(weight))
        super().__init__(
            margins=None,
            weights={} if weight is None else {"focal_weight": _copy("weight", weight)},
            alpha=0.0,
            beta=1.0,
            gamma=gamma,
            s=1.0,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=backend,
            class_group=class_group,
        )


def _margins(
    cls_num_list: ClassCounts, max_m: float, class_group: ClassGroup | None, min_count: float | None
) -> Tensor:
    """The margins of all classes; or of this rank's, whose ranks then tell one another their rarest class."""
    if not isinstance(class_group, ClassShares):
        return ldam_margins(cls_num_list, max_m, min_count=min_count)
    import torch.distributed as dist

    check_max_m(max_m)
    counts = read_counts(cls_num_list)
    sizes = class_group.total, class_group.local
    if len(counts) not in sizes:
        raise ValueError(
            f"cls_num_list must hold the {sizes[0]} classes of all ranks or the {sizes[1]} of this one, "
            f"got {len(counts)}"
        )
    share = len(counts) != class_group.total
    empty = share and class_group.local == 0
    counts = counts if empty else check_counts(counts, min_count)
    rarest = float("inf") if empty else counts.min().item()
    known = torch.tensor([rarest, share, not share], dtype=torch.float64, device=class_group.device or "cpu")
    with explained("the exchange of the ranks' rarest classes", class_group.group):
        dist.all_reduce(known, dist.ReduceOp.MIN, group=class_group.group)
    known = known.cpu()
    if not known[1:].any():
        raise ValueError("cls_num_list must hold all classes on all ranks or this rank's share on all, got both")
    return margins_from_rarest(counts, known[0], max_m)


def _num_classes(weight: Tensor) -> int:
    """C, where the weights alone tell it."""
    check_dense("weight", weight, "(C,)")
    if weight.dim() != 1 or len(weight) == 0:
        raise ValueError(f"weight must have shape (C,), one value a class, got {tuple(weight.shape)}")
    return len(weight)


def _copy(name: str, weight: Tensor | None) -> Tensor | None:
    """A private copy of the weights, so that set_weight() changes no tensor of the caller."""
    if weight is None:
        return None
    check_memory(name, weight)
    return weight.clone()
