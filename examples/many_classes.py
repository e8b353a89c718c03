"""Trains a classifier of 100,000 classes whose weight is spread over processes, on synthetic long-tailed data.

    python examples/many_classes.py                                       # starts 2 processes by itself
    torchrun --nproc-per-node 2 examples/many_classes.py                  # or is started by torchrun

Every process holds its share of the classes and the same backbone; all see the same batch. `LinearLMFLoss` makes the
logits of its own classes a chunk at a time, and the loss is that of all of them.
"""

import argparse
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its functions keep, as a default argument, the one they find
import torch.multiprocessing as mp
from torch import Tensor, nn

from lmf_kernels import LinearLMFLoss


def synthetic_batch(centres: Tensor, counts: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points around the centres of classes that are drawn by their long-tailed counts."""
    target = torch.multinomial(counts.float(), size, replacement=True, generator=generator)
    return centres[target] + 0.3 * torch.randn(size, centres.shape[1], generator=generator), target


@torch.no_grad()
def accuracy(head: LinearLMFLoss, features: Tensor, target: Tensor) -> float:
    """Top-1 over the classes of all processes: each offers its best class and that one's logit."""
    best, index = head.logits(features).max(1)
    offers = torch.stack((best.double(), (index + head.class_group.first).double()))
    gathered = [torch.empty_like(offers) for _ in head.class_group.sizes]
    dist.all_gather(gathered, offers)
    logits, classes = torch.stack(gathered, 1)
    predicted = classes.gather(0, logits.argmax(0, keepdim=True)).squeeze(0)
    return (predicted == target).double().mean().item()


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)  # the same on all processes; the head draws its own numbers on each
    generator = torch.Generator().manual_seed(options.seed)
    counts = (options.classes / torch.arange(1, options.classes + 1)).ceil().long()  # Zipf's law
    centres = torch.randn(options.classes, options.features, generator=generator)
    width = options.features
    backbone = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
    head = LinearLMFLoss(width, counts, bias=False, normalize=True, s=options.s, class_group=dist.group.WORLD)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=options.lr)
    losses, first = [], dist.get_rank() == 0
    if first:
        print(f"{options.classes} classes over {dist.get_world_size()} processes: {head.class_group.sizes}", flush=True)
    for step in range(1, options.steps + 1):
        x, target = synthetic_batch(centres, counts, options.batch, generator)
        loss = head(backbone(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % options.every == 0:
            x, target = synthetic_batch(centres, counts, options.batch, generator)
            right = accuracy(head, backbone(x), target)
            losses.append(loss.item())
            if first:
                print(f"step {step}: loss {losses[-1]:.3f}, accuracy {right:.3f}", flush=True)
    if first:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {right:.3f}")


def finish() -> None:
    """Nobody leaves while another still talks to it, and gloo's threads end, as nothing here still holds the group.

    A thread that still let go of a collective's tensors when the interpreter ends would abort the process.
    """
    dist.barrier()
    dist.destroy_process_group()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between two reports")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--s", type=float, default=30.0, help="scale of the cosines in the LDAM term")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="where torchrun does not say")
    return parser.parse_args(arguments)


def _process(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.processes)
    train(options)
    finish()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
        train(options)
        finish()
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_process, (options, os.path.join(folder, "store")), options.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
