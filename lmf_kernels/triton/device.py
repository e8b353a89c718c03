"""What launches need to know of a device, and the counters of its forward launches."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


class Device:
    """What launches need to know of a device, and the counters of its forward launches.

    A counter is zero between launches, and launches that may overlap have different ones:
    * eager launches have one for each stream, zeroed on that stream, and launches of one stream do not overlap;
    * a launch under graph capture takes one that is never given to another, since graphs captured on one stream may
      replay at the same time, but replays of one graph do not. These are made by eager calls beforehand: what is
      allocated and zeroed under capture would be zeroed by every replay, at a time when another may be counting.
    """

    SPARE = 1024

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"  # else Triton's interpreter or an emulator
        properties = torch.cuda.get_device_properties(device) if self.on_gpu else None
        self.multiprocessors = properties.multi_processor_count if properties else 132
        self.warp_size = getattr(properties, "warp_size", 32)
        self.is_nvidia = torch.version.hip is None
        self._of_stream: dict[int, Tensor] = {}
        self._spare: list[Tensor] = []

    def made_current(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches on the current device."""
        if not self.on_gpu or self.device.index == torch.cuda.current_device():
            return _NOTHING
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index) if self.on_gpu else 0

    def counter(self) -> Tensor:
        """A zero int32 for one launch on the current stream, aligned as the kernel was compiled for."""
        if self.on_gpu and torch.cuda.is_current_stream_capturing():
            if not self._spare:
                raise RuntimeError("warm up first: call the loss once on this device before CUDA graph capture")
            return self._spare.pop()
        if len(self._spare) < self.SPARE // 2:
            self._spare += torch.zeros((self.SPARE, 4), dtype=torch.int32, device=self.device).unbind()
        stream = self.stream()
        if stream not in self._of_stream:
            self._of_stream[stream] = torch.zeros(4, dtype=torch.int32, device=self.device)
        return self._of_stream[stream]


_NOTHING = contextlib.nullcontext()


@functools.cache
def device_of(device: torch.device) -> Device:
    return Device(device)
