"""What --resume reads: the finished trainings of results.json, and the state of the unfinished one."""

import json
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .loop import History, Outcome, Trainer
from .metrics import Metrics
from .options import Config
from .output import write_atomically
from .record import Record

CHECKPOINT = "checkpoint.pt"
RESULTS = "results.json"


def save(config: Config, loss: str, seed: int, trainer: Trainer) -> None:
    """Keep the training's state after an epoch; the previous one is replaced in one step."""
    state = {"loss": loss, "seed": seed, "config": _plain(config.identity()), **trainer.state()}
    write_atomically(config.out / CHECKPOINT, lambda file: torch.save(state, file))


def restore(config: Config, loss: str, seed: int, trainer: Trainer) -> None:
    """Continue the training if the checkpoint is its own."""
    path = config.out / CHECKPOINT
    if not path.exists():
        return
    try:
        state = torch.load(path, map_location=trainer.device, weights_only=True)
    except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
        raise UserError(
            f"--resume: {path} cannot be read ({type(error).__name__}); delete it to start that training anew"
        ) from error
    _check_same(path, state["config"], config)
    if (state["loss"], state["seed"]) == (loss, seed):
        trainer.load_state(state)


def discard(folder: Path) -> None:
    """Remove the checkpoint of a training that is finished."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def finished_records(config: Config) -> list[Record]:
    """The records of an earlier run of the same configuration."""
    path = config.out / RESULTS
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text())
        records = [record_of(record) for record in results["records"]]
        earlier = dict(results["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {path} cannot be read ({error})") from error
    _check_same(path, earlier, config)
    return records


def _check_same(path: Path, earlier: dict[str, Any], config: Config) -> None:
    for key, value in _plain(config.identity()).items():
        if earlier.get(key) != value:
            raise UserError(f"--resume: {path} was made with {key} {earlier.get(key)}, now it is {value}")


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def record_of(fields: dict[str, Any]) -> Record:
    """A record of results.json."""
    fields = dict(fields)
    test = Metrics(**{name: fields.pop(name) for name in Metrics.__dataclass_fields__})
    history = History(**fields.pop("history"))
    return Record(fields.pop("loss"), fields.pop("seed"), Outcome(test=test, history=history, **fields))
