"""Data-parallel training under torchrun: who this process is, and sums and lists over all processes."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the training; with one process everything here does nothing."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """All processes' values (..., n_i), joined on the last dimension."""
        if self.size == 1:
            return values
        parts: list[torch.Tensor] = [values] * self.size
        dist.all_gather_object(parts, values.cpu())
        return torch.cat([part.to(values.device) for part in parts], dim=-1)

    def share_buffers(self, model: torch.nn.Module) -> None:
        """Give every process the first one's buffers (batch normalisation's statistics)."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def usable_device(name: str) -> torch.device:
    """The device of --device; a UserError if this machine has none such."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def join(device: torch.device) -> tuple[Ranks, torch.device]:
    """Join the processes that torchrun started, if it did; each one gets its own GPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), size), device


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
