"""One of two gloo processes that train on their parts of a joint batch; test_distributed.py compares what they save.

Not a test module itself: it is imported in spawned processes, where everything heavy must be cheap to import.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lmf_kernels import FocalLoss, LDAMLoss, LMFLoss, global_normalizer

WORLD = 2
SHARES = (17, 6)  # rows of each rank
MICRO = ((9, 1, 7), (2, 3, 1))  # rows of each rank's micro-batches
COUNTS = [500, 80, 9, 40]


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def joint_batch() -> tuple[Tensor, Tensor]:
    """Labels of rank 0 are mostly of light classes, those of rank 1 of heavy ones; some of each are ignored."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(SHARES), 6, dtype=torch.float64, generator=generator)
    y = torch.cat([torch.arange(SHARES[0]) % 3, 2 + torch.arange(SHARES[1]) % 2])
    y[[3, 4, 19]] = -100
    return x, y


def losses() -> dict[str, Any]:
    weight = torch.tensor([0.2, 0.7, 2.0, 5.0])
    return {
        "lmf": LMFLoss(COUNTS, ldam_weight=weight, focal_weight=weight.flip(0), s=3.0),
        "ldam": LDAMLoss(COUNTS, weight=weight, s=3.0),
        "focal": FocalLoss(weight=weight),
        "plain": LMFLoss(COUNTS, s=3.0),
    }


def gradients(module: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in module.parameters()]
    return [(g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for g in grads]


def average(loss: Tensor) -> Tensor:
    """What training loops log."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / WORLD


def one_batch(net: nn.Module, criterion: Any, x: Tensor, y: Tensor, rank: int) -> Tensor:
    loss = criterion(net(x), y, normalizer=global_normalizer(y, criterion))
    loss.backward()
    return average(loss)


def without_normalizer(net: nn.Module, criterion: Any, x: Tensor, y: Tensor, rank: int) -> Tensor:
    loss = criterion(net(x), y)
    loss.backward()
    return average(loss)


def accumulated(net: nn.Module, criterion: Any, x: Tensor, y: Tensor, rank: int) -> Tensor:
    xs, ys = x.split(MICRO[rank]), y.split(MICRO[rank])
    normalizer = global_normalizer(ys, criterion)
    total = torch.zeros((), dtype=x.dtype)
    for i, (part, labels) in enumerate(zip(xs, ys, strict=True)):
        last = i == len(xs) - 1
        if isinstance(net, DistributedDataParallel):
            net.require_backward_grad_sync = last  # what no_sync() does
        else:
            net.set_requires_gradient_sync(last)
        loss = criterion(net(part), labels, normalizer=normalizer)
        loss.backward()
        total += loss.detach()
    return average(total)


STEPS: dict[str, Callable[..., Tensor]] = {
    "one batch": one_batch,
    "accumulated": accumulated,
    "without normalizer": without_normalizer,
}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (WORLD,))
    x, y = (part.split(SHARES)[rank] for part in joint_batch())
    results: dict[str, Any] = {}
    for kind, criterion in losses().items():
        for step, run in STEPS.items():
            for wrapper in ("ddp", "fsdp2"):
                net = copy.deepcopy(model())
                net = DistributedDataParallel(net) if wrapper == "ddp" else fully_shard(net, mesh=mesh)
                loss = run(net, criterion, x, y, rank)
                results[f"{kind}, {step}, {wrapper}"] = (loss, gradients(net))

    calls: list[tuple[int, ...]] = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, *a, **k: (calls.append(tuple(tensor.shape)), all_reduce(tensor, *a, **k))[1]
    criterion = losses()["lmf"]
    bad = torch.tensor([[0, 99], [-100, -5]]) if rank else torch.tensor([1, 2, 2])
    results["bad labels"] = global_normalizer(bad, criterion)
    results["reductions"] = list(calls)
    groups = [dist.new_group([i]) for i in range(WORLD)]
    results["own group"] = global_normalizer(bad, criterion, groups[rank])
    results["nothing kept"] = global_normalizer(torch.full((3,), -100), criterion)
    results["one rank keeps"] = global_normalizer(torch.full((3,), 0 if rank else -100), criterion)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
