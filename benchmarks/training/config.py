"""Everything that a run of the benchmark is told, as one value."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .loop import Speed
from .losses import LossOptions
from .models import Protocol


@dataclass(frozen=True)
class Config:
    """The options of the command line, complete: nothing is None that a default fills."""

    data: str
    model: str
    weights: str | None
    head: str
    losses: tuple[str, ...]
    seeds: tuple[int, ...]
    protocol: Protocol
    loss_options: LossOptions
    speed: Speed
    grouped: bool
    strict: bool
    device: str
    workers: int
    threads: int
    tensorboard: bool
    grad_cam: bool
    resume: bool
    checkpoint_seconds: float
    out: Path

    def identity(self) -> dict[str, Any]:
        """What must be equal for results to belong together; losses, seeds and the machine may differ."""
        may_differ = {
            "losses",
            "seeds",
            "device",
            "workers",
            "threads",
            "tensorboard",
            "grad_cam",
            "resume",
            "checkpoint_seconds",
            "out",
        }
        whole = asdict(self)
        return {field.name: whole[field.name] for field in fields(self) if field.name not in may_differ}
