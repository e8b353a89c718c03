"""The command line of the training benchmark."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NoReturn

from . import checkpoint, gradcam, many_classes
from .config import Config
from .config_file import config_arguments
from .errors import UserError
from .experiment import Experiment, usable_device
from .loop import AMP, Speed
from .losses import CLASS_WEIGHTS, LABELS, LossOptions
from .models import HEADS, LAST_LAYER, TIMM, Protocol, check_model_name, is_small, protocol_of, smallest_image
from .ranks import leave
from .readers import FORMS
from .results import finish, write_results
from .split import describe_split

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
NO_WEIGHTS = "none"  # overrides a config file's
MANY_CLASSES = "many-classes"  # the command beside the comparison
INTERRUPTED = 130  # the shell's exit code for Ctrl-C


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage as well."""
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == [MANY_CLASSES]:
            return _many_classes(arguments[1:])
        return _run(Experiment(parse(argv)))
    except UserError as error:
        print("train.py: error:", " ".join(str(error).split()), file=sys.stderr)  # one line
        return 2
    except KeyboardInterrupt:  # before the first training
        return INTERRUPTED
    finally:
        leave()


def _many_classes(arguments: Sequence[str]) -> int:
    """What the loss takes of a step of a linear classifier of many classes."""
    parser = Parser(prog=f"train.py {MANY_CLASSES}", allow_abbrev=False, description=many_classes.__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    sizes = {"features": 512, "classes": 20_000, "batch": 1024, "rounds": many_classes.ROUNDS}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=_positive, default=size, help=f"default: {size}")
    options = parser.parse_args(arguments)
    device = usable_device(options.device)
    print(f"Linear classifier {options.features} -> {options.classes}, batch {options.batch}, {options.rounds} rounds")
    print(
        many_classes.table(
            many_classes.measure(device, options.features, options.classes, options.batch, options.rounds)
        )
    )
    return 0


def parse(argv: Sequence[str] | None) -> Config:
    """The command line as a Config."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.config is not None:  # the command line comes later and wins
        options = parser.parse_args(
            [*config_arguments(options.config, parser), *(sys.argv[1:] if argv is None else argv)]
        )
    name, _, _ = options.data.partition(":")
    model = options.model or {"digits": "small_cnn", "keel": "mlp"}.get(name, "resnet50")
    check_model_name(model)
    _check_out(options.out)
    return Config(
        data=options.data,
        model=model,
        weights=None if options.weights == NO_WEIGHTS else options.weights,
        head=options.head,
        losses=tuple(dict.fromkeys(options.losses)),
        seeds=tuple(range(options.seeds)),
        protocol=_protocol(model, options),
        loss_options=_loss_options(options),
        speed=Speed(options.amp, options.channels_last, options.compile),
        grouped=options.grouped,
        strict=options.strict,
        device=options.device,
        workers=options.workers,
        threads=options.threads or (1 if is_small(model) else CORES),  # small ones are not worth sharing out
        tensorboard=options.tensorboard,
        grad_cam=options.grad_cam,
        resume=options.resume,
        checkpoint_seconds=options.checkpoint_seconds,
        out=options.out,
    )


def _check_out(out: Path) -> None:
    """Nothing is made yet: the folder appears with the first result."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: no permission to write into {existing}")


def _run(experiment: Experiment) -> int:
    first = experiment.ranks.first
    if first:
        _describe(experiment)
        if not experiment.config.resume:
            checkpoint.discard(experiment.config.out)
            gradcam.discard(experiment.config.out)
    records = list(experiment.finished)
    code = 0
    try:
        for record in experiment.runs():
            records.append(record)
            if first:
                write_results(experiment, records)
                checkpoint.discard(experiment.config.out)
    except KeyboardInterrupt:
        print(f"interrupted: {len(records)} finished trainings are kept", file=sys.stderr)
        code = INTERRUPTED
    if first and records:
        finish(experiment, records)
    return code


def _describe(experiment: Experiment) -> None:
    config, samples = experiment.config, experiment.samples
    complete = (
        ", the class counts are the published ones" if samples.published_counts and not samples.incomplete else ""
    )
    print(f"data: {samples.name}; {len(samples.labels)} images in {len(samples.class_names)} classes{complete}")
    if samples.incomplete:
        print(f"warning: {samples.name} is not complete: {samples.incomplete}")
    print(f"split: {describe_split(samples, config.grouped)}")
    print(f"model: {config.model}, {config.protocol.epochs} epochs, {experiment.device}", flush=True)
    if config.resume:
        print(f"resumed: {len(experiment.finished)} trainings were finished before", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        allow_abbrev=False,
        description="Train on imbalanced data with each loss of the LMF paper and compare the results.",
        epilog=f"train.py {MANY_CLASSES} times a step of a classifier of 20,000 classes instead; see its --help.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of options; given ones win over it")
    parser.add_argument("--data", default="digits", help=f"{FORMS} (default: digits)")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(LAST_LAYER)} or {TIMM}NAME (default: small_cnn for digits, mlp for keel, else resnet50)",
    )
    parser.add_argument(
        "--weights", default=NO_WEIGHTS, help="the name of pretrained weights, such as IMAGENET1K_V2 (default: none)"
    )
    parser.add_argument(
        "--head", choices=HEADS, default="linear", help="last layer; cosine is LDAM-DRW's (default: linear)"
    )
    parser.add_argument("--losses", nargs="+", choices=LABELS, default=list(LABELS), help="default: all")
    parser.add_argument("--seeds", type=_positive, default=3, help="how many seeds: 0, 1, ... (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="output folder (default: results)")
    parser.add_argument(
        "--grouped",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep all images of a lesion or patient in one part of the split",
    )
    parser.add_argument(
        "--strict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="stop at unreadable images (default), or leave them out with --no-strict",
    )
    parser.add_argument(
        "--workers",
        type=_natural,
        default=CORES,
        help="processes that decode image files (default: one a core)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        help="threads of torch on the CPU (default: 1 for small_cnn and mlp, else one a core)",
    )
    for name, purpose in (
        ("tensorboard", "write curves to OUT/tensorboard"),
        ("grad-cam", "overlays of test samples of the rarest classes"),
        ("resume", "continue what an earlier run left in OUT"),
    ):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=False, help=purpose)
    parser.add_argument(
        "--checkpoint-seconds",
        type=_not_negative,
        default=60.0,
        help="least time between two checkpoints of a training (default: 60)",
    )
    _add_speed(parser)
    _add_protocol(parser)
    _add_loss_options(parser)
    return parser


def _add_speed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed", "Under torchrun the processes share every batch (gloo or NCCL).")
    group.add_argument("--amp", choices=AMP, help="mixed precision (default: float32)")
    for name, purpose in (("channels-last", "store images as NHWC"), ("compile", "torch.compile the model")):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=False, help=purpose)


def _add_protocol(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "protocol",
        "Defaults: the paper's for torchvision's models (100 epochs, Adam 1e-4), shorter for small_cnn and mlp.",
    )
    group.add_argument("--epochs", type=_positive)
    group.add_argument("--batch-size", type=_positive)
    group.add_argument("--lr", type=_positive_float)
    group.add_argument("--weight-decay", type=_not_negative)
    group.add_argument("--lr-step", type=_positive, help="epochs until the learning rate falls")
    group.add_argument("--lr-gamma", type=_positive_float, help="the factor by which it falls")
    group.add_argument("--image-size", type=_positive, help="side to which images are resized")


def _protocol(model: str, options: argparse.Namespace) -> Protocol:
    given = {field.name: getattr(options, field.name) for field in fields(Protocol)}
    protocol = replace(protocol_of(model), **{name: value for name, value in given.items() if value is not None})
    if protocol.image_size is not None and protocol.image_size < smallest_image(model):
        raise UserError(
            f"--image-size {protocol.image_size} is too small for {model}, expected at least {smallest_image(model)}"
        )
    return protocol


def _add_loss_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hyper-parameters of the losses", "Defaults: the paper's.")
    for loss, defaults in vars(LossOptions()).items():
        for name, default in vars(defaults).items():
            flag = f"--{loss}-{name.replace('_', '-')}"
            if name == "class_weights":
                group.add_argument(flag, choices=CLASS_WEIGHTS, default=default, help=f"default: {default}")
            else:
                group.add_argument(flag, type=float, default=default, help=f"default: {default}")


def _loss_options(options: argparse.Namespace) -> LossOptions:
    return LossOptions(
        **{
            loss: replace(defaults, **{name: getattr(options, f"{loss}_{name}") for name in vars(defaults)})
            for loss, defaults in vars(LossOptions()).items()
        }
    )


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(smallest: int, text: str) -> int:
    if not text.lstrip("-").isdigit() or int(text) < smallest:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {smallest}, got {text!r}")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text!r}")
    return value


def _positive_float(text: str) -> float:
    value = _not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
