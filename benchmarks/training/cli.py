"""The command line of the training benchmark."""

import sys
from collections.abc import Callable, Sequence

from . import checkpoint, gradcam, many_classes
from .arguments import INTERRUPTED, exit_code
from .data.split import describe_split
from .experiment import Experiment
from .options import parse
from .report.results import finish, write_results

# The commands beside the comparison.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"many-classes": many_classes.main}
EPILOG = f"train.py {{{', '.join(COMMANDS)}}} does something else instead; see its --help."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in COMMANDS:
        return exit_code("train.py", lambda: COMMANDS[arguments[0]](arguments[1:]))
    return exit_code("train.py", lambda: _compare(Experiment(parse(arguments, EPILOG))))


def _compare(experiment: Experiment) -> int:
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
