"""Runs functions on several gloo processes of this machine and brings back what they raise."""

from __future__ import annotations

import datetime
import gc
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which its functions would keep, and its threads, to the end
import torch.multiprocessing as mp

LIMIT, TIMEOUT = 300.0, 60.0  # seconds, of all cases and of a collective: nothing may hang


def run(
    ranks: int, cases: list[tuple[Callable[..., None], Any]], killed: frozenset[int] = frozenset()
) -> dict[int, list[str | None]]:
    """Calls the cases, functions with their argument or None, on every rank; each rank's errors or None.

    The functions must be importable by name. The ranks `killed` must end by SIGKILL, and say nothing.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        arguments = ranks, Path(folder) / "store", queue, cases
        processes = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        end = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        assert not hanging, f"ranks {hanging} hang"
        results = {}
        while not queue.empty():
            rank, errors = queue.get()
            results[rank] = errors
    codes = [process.exitcode for process in processes]
    assert codes == [-signal.SIGKILL if rank in killed else 0 for rank in range(ranks)], f"exit codes {codes}"
    assert results.keys() == set(range(ranks)) - killed
    return results


def _rank(rank: int, ranks: int, store: Path, queue: Any, cases: list[tuple[Callable[..., None], Any]]) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=ranks, timeout=timeout)
    errors: list[str | None] = []
    for function, argument in cases:
        torch.manual_seed(0)
        try:
            function(*() if argument is None else (argument,))
            errors.append(None)
        except BaseException:
            errors.append(traceback.format_exc())
    queue.put((rank, errors))
    dist.destroy_process_group()
    gc.collect()  # frames of expected errors hold groups, too
