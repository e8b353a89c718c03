"""Every training of the paper's Tables 1 and 2, one dataset and network after the other, and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from .. import cli
from ..arguments import INTERRUPTED, Parser, exit_code, option, several
from ..data.readers import read
from ..report.paper_numbers import DATASETS
from ..report.run import read_run
from .report import write_report

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = ("efficientnet_v2_s", "resnet50", "densenet121")


@dataclass(frozen=True)
class Options:
    """Further options go to train.py, such as --device cuda, --seeds 5 or --grad-cam. An earlier run is continued."""

    data: Path = option(Path("data"), "the folder with a folder for each dataset")
    datasets: tuple[str, ...] = several(DATASETS, "the paper's datasets", choices=DATASETS)
    models: tuple[str, ...] = several(MODELS[:2], "the paper's networks", choices=MODELS)
    out: Path = option(Path("results/paper"), "output folder; what an earlier run left in it is continued")


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then print and write the tables and Figure 1; returns the exit code."""

    def run() -> int:
        parser = Parser(prog="paper.py", description=__doc__)
        parser.add_arguments(Options, "options")
        given, others = parser.parse_known_args(argv)
        return _run(given.options, others)

    return exit_code("paper.py", run)


def _run(options: Options, others: Sequence[str]) -> int:
    specs = {dataset: f"{dataset}:{options.data / dataset}" for dataset in options.datasets}
    for spec in specs.values():
        read(spec).check()  # before days of training on the others
    code = 0
    runs = []
    for dataset, model in product(options.datasets, options.models):
        out = options.out / f"{dataset}-{model}"
        print(f"== {dataset}, {model} ==", flush=True)
        config = CONFIGS / f"{dataset}-{model}.toml"
        arguments = ["--config", str(config), "--data", specs[dataset], "--out", str(out), "--resume", *others]
        code = cli.main(arguments)
        if code not in (0, INTERRUPTED):
            return code
        runs += [run for run in [read_run(out)] if run is not None]
        if code:
            break
    if runs:
        write_report(runs, options.out)
    return code
