"""Which rank holds which classes, where these are spread over the ranks of a process group."""

import contextlib
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler, and Triton with it

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
