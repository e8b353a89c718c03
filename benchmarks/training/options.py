"""Everything that a run of the benchmark is told, as one value: the command line and the TOML file in front of it."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .arguments import CORES, Parser, natural, not_negative, option, positive, several, switch
from .data.readers import FORMS
from .errors import UserError
from .loop import Speed
from .losses import LABELS, OPTIONS, LossOptions
from .models import HEADS, MODELS, TIMM, Protocol, model_of
from .toml import read_toml

NO_WEIGHTS = "none"  # overrides a config file's


@dataclass(frozen=True)
class Config:
    """What is trained on what, and where that goes."""

    # compare=False is for what may differ between runs whose results belong together.
    data: str = option("digits", FORMS)
    model: str = option(
        None,
        f"{', '.join(MODELS)} or {TIMM}NAME; None: small_cnn for digits, mlp for keel, else resnet50",
        metavar="NAME",
    )
    weights: str | None = option(
        NO_WEIGHTS, "the name of pretrained weights, such as IMAGENET1K_V2", type=str, nargs=None, metavar="NAME"
    )
    head: str = option("linear", "last layer; cosine is LDAM-DRW's", choices=HEADS)
    losses: tuple[str, ...] = several(tuple(LABELS), "the losses to compare", choices=LABELS, compare=False)
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "how many: 0, 1, ...", type=lambda text: range(positive(text)), nargs=None, compare=False
    )
    grouped: bool = switch(False, "keep all images of a lesion or patient in one part of the split")
    strict: bool = switch(True, "stop at unreadable images, or leave them out with --no-strict")
    device: str = option("cpu", "cpu, cuda, cuda:1, ...", compare=False)
    workers: int = option(CORES, "processes that decode image files", type=natural, compare=False)
    threads: int = option(
        None,
        "threads of torch on the CPU; None: 1 for small_cnn and mlp, else one per core",
        type=positive,
        compare=False,
    )
    tensorboard: bool = switch(False, "write curves to OUT/tensorboard", compare=False)
    grad_cam: bool = switch(False, "overlays of test samples of the rarest classes", compare=False)
    resume: bool = switch(False, "continue what an earlier run left in OUT", compare=False)
    checkpoint_seconds: float = option(
        60.0, "least time between two checkpoints of a training", type=not_negative, compare=False
    )
    out: Path = option(Path("results"), "output folder", compare=False)
    protocol: Protocol = option(None, "", cmd=False)
    speed: Speed = option(None, "", cmd=False)
    loss_options: LossOptions = option(None, "", cmd=False)

    def identity(self) -> dict[str, Any]:
        """What must be equal for results to belong together."""
        whole = asdict(self)
        return {field.name: whole[field.name] for field in fields(self) if field.compare}


def parse(argv: Sequence[str], epilog: str = "") -> Config:
    """The command line as a Config in which nothing is None that a default fills."""
    parser = _parser(epilog)
    given = parser.parse_args(argv)
    if given.config is not None:  # the command line comes later and wins
        arguments = _file_arguments(given.config)
        _, unknown = _parser(epilog).parse_known_args(arguments)
        if unknown:
            raise UserError(f"--config {given.config}: there is no option {unknown[0].partition('=')[0]}")
        given = _parser(epilog).parse_args([*arguments, *argv])
    config: Config = given.run
    dataset, _, _ = config.data.partition(":")
    model = config.model or {"digits": "small_cnn", "keel": "mlp"}.get(dataset, "resnet50")
    small = model_of(model).small
    _check_out(config.out)
    return replace(
        config,
        model=model,
        weights=None if config.weights == NO_WEIGHTS else config.weights,
        losses=tuple(dict.fromkeys(config.losses)),
        seeds=tuple(config.seeds),
        threads=config.threads or (1 if small else CORES),  # small ones are not worth sharing out
        protocol=_protocol(model, given.protocol),
        speed=given.speed,
        loss_options=LossOptions(**{loss: getattr(given, loss) for loss in OPTIONS}),
    )


def _parser(epilog: str) -> Parser:
    parser = Parser(
        prog="train.py",
        description="Train on imbalanced data with each loss of the LMF paper and compare the results.",
        epilog=epilog,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of options; given ones win over it")
    parser.add_arguments(Config, "run")
    parser.add_arguments(Speed, "speed")
    parser.add_arguments(Protocol, "protocol")
    for loss, defaults in OPTIONS.items():
        parser.add_arguments(type(defaults), loss, prefix=f"{loss}-", default=defaults)
    return parser


def _protocol(model: str, given: Protocol) -> Protocol:
    known = model_of(model)
    protocol = replace(known.protocol, **{name: v for name, v in vars(given).items() if v is not None})
    size, smallest = protocol.image_size, known.smallest_image
    if size is not None and size < smallest:
        raise UserError(f"--image-size {size} is too small for {model}, expected at least {smallest}")
    return protocol


def _check_out(out: Path) -> None:
    """Nothing is made yet: the folder appears with the first result."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: no permission to write into {existing}")


def _file_arguments(path: Path) -> list[str]:
    """A TOML file of options as a command line: ``[lmf] s = 10`` is ``--lmf-s=10``."""
    return _flat("-", read_toml(path, "--config "))


def _flat(flag: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [part for name, item in value.items() for part in _flat(f"{flag}-{name.replace('_', '-')}", item)]
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
