"""`LinearLMFLoss`: a linear classifier and its loss in one module, without the logits in memory."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._hints import device_misfit
from .._validate import Normalizer, Reduction
from ..counts import ClassCounts
from ..modules import LMFLoss
from ..sharded.shares import ClassGroup, ClassShares
from .functional import linear_lmf_loss


class LinearLMFLoss(LMFLoss):
    r"""`nn.Linear(in_features, C)` followed by `LMFLoss(cls_num_list)`, without the logits in memory.

    For features x of one sample, rows W_j of `linear.weight` and b = `linear.bias`::

        z_j  = <x, W_j> + b_j                            or, with normalize, <x / |x|, W_j / |W_j|> + b_j
        loss = alpha * ldam_weight[y] * LDAM(z, y) + beta * focal_weight[y] * focal(z, y)

    with the terms of `LMFLoss`. See `linear_lmf_loss` for how gradients and memory are handled.

    Args:
        in_features: D, the length of a feature vector.
        cls_num_list: training samples per class, each >= 1, length C; as `LMFLoss`.
        bias: whether the classifier has a bias; the published cosine classifiers have none.
        normalize: cosine classifier, which s = 30 is meant for.
        alpha, beta, gamma, max_m, s, weight, ldam_weight, focal_weight, ignore_index, reduction, backend, min_count: as
            `LMFLoss`.
        memory_budget: bytes for a chunk of logits and its temporaries; None is the default of `linear_lmf_loss`.
        class_group: a process group over whose ranks the classes are spread as DTensor's Shard and torch.chunk do:
            `linear` then holds this rank's rows only, drawn differently on every rank. `ClassShares` place them
            otherwise, and allow cls_num_list and class weights to be this rank's share on every rank, as in `LMFLoss`.
        device, dtype: of the classifier's parameters.

    Attributes:
        linear: the classifier, an `nn.Linear` (as in torch's nn.LinearCrossEntropyLoss).
        margins, ldam_weight, focal_weight: buffers as in `LMFLoss`, in state_dict too; `set_weight` changes the weights
            in place.

    Shape:
        input: features (N, D) or (D,).
        target: class indices (N,) or (), int64.
        output: 0-dim, or the target's shape for 'none'; float32 (float64 for float64 features).

    Raises:
        ValueError, TypeError: as `LMFLoss`.

    Example:
        >>> head = LinearLMFLoss(64, torch.full((1000,), 5), bias=False, normalize=True)
        >>> loss = head(torch.randn(16, 64), torch.randint(0, 1000, (16,)))
        >>> loss.backward()
    """

    def __init__(
        self,
        in_features: int,
        cls_num_list: ClassCounts,
        *,
        bias: bool = True,
        normalize: bool = False,
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
        memory_budget: int | None = None,
        class_group: ClassGroup | None = None,
        min_count: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            cls_num_list,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            max_m=max_m,
            s=s,
            weight=weight,
            ldam_weight=ldam_weight,
            focal_weight=focal_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=backend,
            class_group=class_group,
            min_count=min_count,
        )
        self.to(device)
        self.normalize = normalize
        self.memory_budget = memory_budget
        assert self.margins is not None
        num_classes = len(self.margins)
        if class_group is None:
            self.linear = nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
            return
        shares = class_group if isinstance(class_group, ClassShares) else ClassShares.even(class_group, num_classes)
        self.class_group = shares
        with _own_random_numbers(shares, device):
            self.linear = nn.Linear(in_features, shares.local, bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor, normalizer: Normalizer | None = None) -> Tensor:
        """The loss of features `input` (N, D) and labels `target` (N,); see `linear_lmf_loss`."""
        try:
            return linear_lmf_loss(
                input,
                self.linear.weight,
                target,
                linear_bias=self.linear.bias,
                normalize=self.normalize,
                margins=self.margins,
                alpha=self.alpha,
                beta=self.beta,
                gamma=self.gamma,
                s=self.s,
                ldam_weight=self.ldam_weight,
                focal_weight=self.focal_weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                normalizer=normalizer,
                backend=self.backend,
                memory_budget=self.memory_budget,
                class_group=self.class_group,
            )
        except (ValueError, RuntimeError) as error:
            self._explain(error, input)
            raise

    def _misfit(self, input: Tensor) -> Exception | None:
        """How features do not fit this head, in the words of its constructor."""
        weight, name = self.linear.weight, type(self).__name__
        if type(input) not in (Tensor, nn.Parameter) or input.dim() not in (1, 2):
            return None
        tables = {key: table for key, table in self._buffers.items() if table is not None}
        moved = device_misfit(name, {"linear.weight": weight, **tables}, input)
        if moved is not None or input.shape[-1] == weight.shape[1]:
            return moved
        return ValueError(
            f"{name} was built for in_features={weight.shape[1]}, input of shape {tuple(input.shape)} has "
            f"{input.shape[-1]}"
        )

    def logits(self, input: Tensor) -> Tensor:
        """The logits (N, C) of features (N, D), for evaluation; with class_group, of this rank's classes."""
        weight = self.linear.weight
        if self.normalize:
            input, weight = F.normalize(input, dim=-1), F.normalize(weight, dim=-1)
        return F.linear(input, weight, self.linear.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, normalize={self.normalize}"


@contextlib.contextmanager
def _own_random_numbers(shares: ClassShares, device: torch.device | str | None) -> Iterator[None]:
    """Inside, this rank's random numbers differ from the other ranks'; outside, all generators advance alike."""
    seed = int(torch.randint(2**62, ())) + shares.rank
    devices = [device] if device is not None and torch.device(device).type != "cpu" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
