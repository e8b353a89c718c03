"""Many threads, forked and spawned workers, and the same bits every time."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checks import DTYPES, INTERPRETED, check
from pairwise import pairs
from torch.utils.data import DataLoader, Dataset

import lmf_kernels
from lmf_kernels import LMFLoss, lmf_loss

ROOT = Path(lmf_kernels.__file__).parents[1]
SHAPES = ((3, 7), (200, 9), (2000, 11), (40, 300), (8, 2100), (2, 5, 40, 40))

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is one per process")


def batch(number):
    """Batch `number`, always the same."""
    generator = torch.Generator().manual_seed(number)
    shape = SHAPES[number % len(SHAPES)]
    z = torch.randn(shape, generator=generator).to(DTYPES[number // len(SHAPES) % len(DTYPES)])
    return z, torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)


def step(number, backend="native"):
    """Loss and gradient of batch `number` through a module; another one raises on the way."""
    z, y = batch(number)
    z.requires_grad_()
    loss = LMFLoss(range(1, z.shape[1] + 1), backend=backend)(z, y)
    loss.backward()
    if number % 5 == 0:
        with pytest.raises(IndexError):
            lmf_loss(z, y + z.shape[1], backend=backend)
    return loss.detach(), z.grad


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_many_threads_at_once(backend):
    numbers = list(range(48))
    serial = [step(number, backend) for number in numbers]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            parallel = list(pool.map(lambda number: step(number, backend), numbers))
            wrong = [number for number in numbers if not same(parallel[number], serial[number])]
            assert not wrong


def test_threads_share_logits_and_module(backend):
    z, y = batch(2)
    z = z.float()
    criterion = LMFLoss(range(1, 12), backend=backend)

    def gradient(_):
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(criterion(leaf, y), leaf)[0]

    want = gradient(0)
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(grad, want) for grad in pool.map(gradient, range(40)))


class Losses(Dataset):
    """Item `number` is the loss and the gradient of a batch, computed where it is loaded."""

    def __len__(self):
        return 2 * len(SHAPES)

    def __getitem__(self, number):
        return step(number)


def load(context):
    step(2)  # the threads of the parent have run
    loader = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120)
    loaded = list(loader)
    assert len(loaded) == len(Losses())
    for number, result in enumerate(loaded):
        assert same(result, step(number))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_dataloader_workers(context):
    """In a Python of their own: where an earlier test used Inductor, autograd has threads and refuses a fork."""
    code = "import sys; sys.path.append(sys.argv[1]); import test_threads; test_threads.load(sys.argv[2])"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), context]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


AFTER_FORK = """
import os, signal, sys, time
import torch
import torch.nn.functional as F
from lmf_kernels import lmf_loss

name, threads, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
z, y = torch.randn(rows, 1000, requires_grad=True), torch.randint(0, 1000, (rows,))
losses = {"lmf": lmf_loss, "cross_entropy": F.cross_entropy}
big = torch.randn(2000, 1000, requires_grad=True), torch.randint(0, 1000, (2000,))
torch.set_num_threads(2)
for loss in losses.values():  # starts OpenMP's threads, which a child does not inherit
    loss(*big).backward()
child = os.fork()
if child == 0:
    if threads:
        torch.set_num_threads(threads)
    losses[name](z, y).backward()
    os._exit(0)
for _ in range(300):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        print("finished" if status == 0 else f"failed with {status}")
        break
    time.sleep(0.05)
else:
    os.kill(child, signal.SIGKILL)
    print("hung")
"""


def after_fork(name, threads, rows=2000):
    command = [sys.executable, "-c", AFTER_FORK, name, str(threads), str(rows)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_forked_child_with_one_thread_finishes():
    """As DataLoader workers are: torch sets one thread in them."""
    assert after_fork("lmf", threads=1) == "finished"


@pytest.mark.slow
def test_forked_child_with_a_small_batch_finishes():
    assert after_fork("lmf", threads=0, rows=4) == "finished"


@pytest.mark.slow
def test_forked_child_is_no_worse_off_than_with_cross_entropy():
    """With OpenMP's threads gone and nobody saying so, F.cross_entropy hangs, and so does this."""
    with ThreadPoolExecutor(2) as pool:
        ours, torchs = pool.map(lambda name: after_fork(name, threads=0), ("lmf", "cross_entropy"))
    assert ours == "finished" or ours == torchs


@pairs(dtype=DTYPES, shape=SHAPES, reduction=("none", "mean", "sum"))
def test_no_bit_depends_on_repetition_or_threads(dtype, shape, reduction, backend):
    """The reference has PyTorch's sums, which are the same for one number of threads."""
    z, y = torch.randn(shape).to(dtype), torch.randint(0, shape[1], (shape[0], *shape[2:]))
    y.view(-1)[1] = -100
    threads, results = torch.get_num_threads(), []
    try:
        for count in (threads, threads, 1, 2, 3, 5) if backend == "native" else (threads,) * 3:
            torch.set_num_threads(count)
            leaf = z.clone().requires_grad_()
            loss = lmf_loss(leaf, y, reduction=reduction, backend=backend)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(same(result, results[0]) for result in results)


@pytest.fixture
def deterministic():
    """Also fills what torch.empty returns with NaN, so that nothing can rest on memory that was never written."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pairs(dtype=DTYPES, shape=((1, 1), *SHAPES[:4], (2, 5, 3, 3), (0, 4)), reduction=("none", "mean", "sum"))
def test_deterministic_algorithms_with_filled_memory(dtype, shape, reduction, backend, deterministic):
    y = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    if y.numel():
        y.view(-1)[0] = -100
    z = torch.randn(shape).to(dtype)
    check(z, y, backend, reduction=reduction, weight=torch.rand(shape[1]) + 0.1)
    check(z.transpose(0, -1).contiguous().transpose(0, -1), y, backend, reduction=reduction)
