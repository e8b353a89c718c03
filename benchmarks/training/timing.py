"""How long the loss takes in each training step, without making a GPU wait."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class LossClock:
    """Collects the time of each ``with clock.step():`` block, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.milliseconds: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the block: by events on a GPU, by the clock on a CPU."""
        if self.cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self.pairs.append(events)
        else:
            start = time.perf_counter()
            yield
            self.milliseconds.append((time.perf_counter() - start) * 1e3)

    def collect(self) -> None:
        """Read the events; call it when the device has finished anyway."""
        self.milliseconds += [start.elapsed_time(end) for start, end in self.pairs]
        self.pairs.clear()

    def median(self) -> float:
        """The median step: the first ones, which load and compile, do not count."""
        return statistics.median(self.milliseconds)
