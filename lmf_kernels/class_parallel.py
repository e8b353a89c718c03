"""Classes spread over ranks: the loss of logits of which every rank holds the columns of its own classes.

Each rank reduces its logits to m, t1, t2, z_y a row (row_sums.py); one max and one packed sum over the group make
them those of whole rows, from which every rank computes the same loss. Backward needs no communication.
"""

import contextlib
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler, and Triton with it

from ._ops import EAGER, backward_op_, sums_op
from .row_sums import Hyper, RowTables, finish, no_sums, relative_to

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ClassShares:
    """Which classes each rank of a process group holds: the ranks' classes follow one another in the order of ranks.

    Building one is collective: all ranks of the group build theirs at the same point, and exchange one number. The
    loss functions take it as `class_group`; a process group alone means the shares of the first call with that group.
    Several heads over the same ranks therefore need a `ClassShares` each (the modules make their own).

    Args:
        group: a process group of torch.distributed.
        num_local: the number of classes that this rank holds, >= 0.
        device: where the group's backend exchanges tensors; None is the CPU.

    Attributes:
        sizes: the classes of each rank; `first` and `local` are this `rank`'s first class and its number of classes,
            `total` is C.
        group: the process group, which is not kept alive: torch.distributed does that until destroy_process_group.

    Raises:
        ValueError: no rank holds a class, or this process is not in the group.
        RuntimeError: the exchange failed; see the message for the likely reasons.
    """

    @_disable_dynamo
    def __init__(self, group: "ProcessGroup", num_local: int, device: torch.device | None = None) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("class_group needs torch.distributed.init_process_group() first")
        if dist.get_rank(group) < 0:
            raise ValueError("class_group must be a process group that this process is in")
        mine = torch.tensor([num_local], dtype=torch.int64, device=device)
        sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        with explained("the exchange of the ranks' numbers of classes", group):
            dist.all_gather(sizes, mine, group=group)
        self._place(group, torch.cat(sizes).tolist(), dist.get_rank(group), device)

    def _place(
        self, group: "ProcessGroup", sizes: Sequence[int], rank: int, device: torch.device | None = None
    ) -> None:
        self.device = device
        self._group = weakref.ref(group)  # a group that outlives destroy_process_group leaves its threads running
        self.rank = rank
        self.sizes = tuple(sizes)
        self.first = sum(self.sizes[:rank])
        self.local = self.sizes[rank]
        self.total = sum(self.sizes)
        if self.total == 0:
            raise ValueError("class_group holds no class: every rank's share is empty")

    @property
    def group(self) -> "ProcessGroup":
        group = self._group()
        if group is None:
            raise RuntimeError("class_group: the process group has been destroyed")
        return group

    @classmethod
    def even(cls, group: "ProcessGroup", num_classes: int) -> "ClassShares":
        """The shares that DTensor's Shard and torch.chunk give: as even as whole chunks allow; no communication."""
        import torch.distributed as dist

        shares = cls.__new__(cls)
        shares._place(group, _chunk_sizes(num_classes, dist.get_world_size(group)), dist.get_rank(group))
        return shares

    def __deepcopy__(self, memo: Any) -> "ClassShares":
        return self  # process groups cannot be copied, and nothing here changes

    def __repr__(self) -> str:
        return f"ClassShares(sizes={self.sizes}, first={self.first})"


ClassGroup = Union["ProcessGroup", ClassShares]

# Every rank looks up a group in its own table, but the answer is the same on all: known since the first call, or not.
_known: "weakref.WeakKeyDictionary[Any, ClassShares]" = weakref.WeakKeyDictionary()


def shares_of(class_group: ClassGroup, num_local: int, device: torch.device) -> ClassShares:
    """The shares behind the option `class_group`, for a rank that holds `num_local` classes."""
    _refuse_compilation()
    if isinstance(class_group, ClassShares):
        shares = class_group
    else:
        import torch.distributed as dist

        if not dist.is_available() or not isinstance(class_group, dist.ProcessGroup):
            raise TypeError(f"class_group must be a process group or ClassShares, got {type(class_group).__name__}")
        if class_group not in _known:
            _known[class_group] = ClassShares(class_group, num_local, device)
        shares = _known[class_group]
    if shares.local != num_local:
        raise ValueError(
            f"class_group gives this rank {shares.local} classes (of {shares.sizes}), got {num_local}; another head "
            "over the same ranks needs class_group=ClassShares(group, num_local)"
        )
    return shares


def _refuse_compilation() -> None:
    """Unless the whole graph is asked for, torch.compile then leaves the loss out of it."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "classes spread over ranks cannot be compiled: keep the loss out of torch.compile, with "
            "torch.compiler.disable"
        )


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing that module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_logits(input: Any, target: Any, class_group: ClassGroup | None) -> tuple[Tensor, Tensor, ClassShares]:
    """The local logits and target of DTensor logits that are sharded on the class axis, and their shares."""
    from torch.distributed.tensor import Replicate

    _refuse_compilation()
    if class_group is not None:
        raise ValueError("class_group must be None for DTensor input, whose device mesh says where the classes are")
    mesh, placements = input.device_mesh, input.placements
    class_axis = 1 if input.dim() > 1 else 0
    if is_dtensor(target):
        if not all(isinstance(placement, Replicate) for placement in target.placements):
            raise ValueError(f"target must be replicated, got placements {target.placements}")
        target = target.to_local()
    if len(placements) != 1 or not placements[0].is_shard(class_axis):
        raise ValueError(
            "DTensor input must be sharded on its class axis over a one-dimensional mesh, got placements "
            f"{placements}: take the sub-mesh (mesh['tp']) of a larger mesh, or pass input.to_local() "
            "and class_group=mesh.get_group('tp')"
        )
    shares = ClassShares.even(mesh.get_group(0), input.shape[class_axis])
    return input.to_local(), target, shares


def _chunk_sizes(num_classes: int, ranks: int) -> list[int]:
    most = -(-num_classes // ranks)
    return [max(0, min(most, num_classes - rank * most)) for rank in range(ranks)]


@contextlib.contextmanager
def explained(what: str, group: "ProcessGroup") -> Iterator[None]:
    """Says which collective of ours failed, and why collectives fail."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"class_group: {what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)}. Most likely "
            "another rank raised an error or ended before it came here (its own log says why), or the ranks do not "
            f"call the loss alike: all need the same target and the same options. torch.distributed says: {error}"
        ) from error


def row_tables(
    target: Tensor,  # (rows,)
    tables: Sequence[Tensor | None],  # margins, LDAM weights, focal weights: (C,) or this rank's share
    first_class: int,
    local: int,
    total: int,
    ignore_index: int,
    acc: torch.dtype,
) -> tuple[list[Tensor | None], list[int]]:
    """The rows' entries of each table, 0 where unknown, and which tables are shares that ranks have to add up."""
    found: list[Tensor | None] = []
    partial = []
    for index, table in enumerate(tables):
        if table is None:
            found.append(None)
            continue
        whole = len(table) == total
        y = target if whole else target - first_class
        here = (y >= 0) & (y < len(table)) & (target != ignore_index)
        if len(table) == 0:
            found.append(torch.zeros(target.shape, dtype=acc, device=target.device))
        else:
            found.append(torch.where(here, table.to(acc)[torch.where(here, y, 0)], 0.0))
        if not whole and local != total:
            partial.append(index)
    return found, partial


def finish_rows(
    shares: ClassShares | None,
    sums: Tensor,  # (4, rows) over this rank's classes
    target: Tensor,
    tables: Sequence[Tensor | None],
    normalizers: tuple[Tensor | None, Tensor | None],
    num_classes: int,  # of this rank
    hyper: Hyper,
    ignore_index: int,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, saved, denominators) of whole rows: at most one max and one sum over the group."""
    acc = sums.dtype
    first, local, total = (
        (0, num_classes, num_classes) if shares is None else (shares.first, shares.local, shares.total)
    )
    found, partial = row_tables(target.reshape(-1), tables, first, local, total, ignore_index, acc)
    if shares is not None and len(shares.sizes) > 1:
        import torch.distributed as dist

        m = sums[0].clone()
        with explained("the max-reduction of the rows' largest logits", shares.group):
            dist.all_reduce(m, dist.ReduceOp.MAX, group=shares.group)
        shared = [tensor for tensor in (found[index] for index in partial) if tensor is not None]
        packed = torch.stack((*relative_to(m, sums, hyper), *shared))
        with explained("the sum-reduction of the rows' sums", shares.group):
            dist.all_reduce(packed, dist.ReduceOp.SUM, group=shares.group)
        sums = torch.cat((m[None], packed[:3]))
        for index, tensor in zip(partial, packed[3:], strict=True):
            found[index] = tensor
    return finish(sums, target, total, RowTables(*found), *normalizers, hyper, ignore_index, reduction)


class _ShardedLoss(torch.autograd.Function):
    """The loss of logits whose class axis is spread over ranks, differentiable once in this rank's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        shares: ClassShares,
        logits: Tensor,
        target: Tensor,
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
    ) -> Tensor:
        hyper = Hyper(alpha, beta, gamma, s)
        if shares.local:
            op = sums_op(backend)
            sums = op(logits, target, shares.first, *hyper, ignore_index, reduction)
        else:
            sums = no_sums(target.numel(), logits)
        loss, saved, denominators = finish_rows(
            shares, sums, target, (margins, ldam_weight, focal_weight), (ldam_normalizer, focal_normalizer),
            shares.local, hyper, ignore_index, reduction,
        )  # fmt: skip
        ctx.save_for_backward(logits, target, saved, denominators)
        ctx.options = backend, shares, (*hyper, ignore_index, reduction)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("lmf_loss with class_group")
        backend, shares, options = ctx.options
        logits, target, saved, denominators = ctx.saved_tensors
        if not shares.local:
            return (None, None, torch.empty_like(logits), *(None,) * 12)
        arguments = target - shares.first, saved, denominators, *options
        if backend in EAGER:
            grad = EAGER[backend][1](grad_output, logits, *arguments)
        else:
            grad = logits.detach().clone()
            backward_op_(backend)(grad_output, grad, *arguments)
        return (None, None, grad, *(None,) * 12)


def refuse_second_derivative(name: str) -> None:
    """For backward functions: raises where the caller asked for a graph of the gradient."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has no second derivative (backward was called with create_graph=True); lmf_loss of whole logits "
            "has one"
        )


@_disable_dynamo
def sharded_loss(backend: str, shares: ClassShares, *arguments: Any) -> Tensor:
    """The differentiable loss of this rank's share of the logits; then the arguments of the forward ops."""
    return _ShardedLoss.apply(backend, shares, *arguments)
