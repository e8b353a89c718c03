"""Every training of the paper's Tables 1 and 2, one dataset and network after the other, and what comes out."""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from . import cli
from .errors import UserError
from .paper_numbers import DATASETS
from .paper_report import read_run, write_report
from .readers import read

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = ("efficientnet_v2_s", "resnet50", "densenet121")


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then print and write the tables and Figure 1; returns the exit code."""
    parser = cli.Parser(
        prog="paper.py",
        allow_abbrev=False,
        description=f"{__doc__} Further options go to train.py, such as --device cuda, --seeds 5 or --grad-cam. "
        "What an earlier run left in --out is continued.",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="the folder with a folder for each dataset (default: data)"
    )
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS), help="default: all")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS[:2]), help=f"default: {' '.join(MODELS[:2])}"
    )
    parser.add_argument("--out", type=Path, default=Path("results/paper"), help="default: results/paper")
    try:
        return _run(*parser.parse_known_args(argv))
    except UserError as error:
        print("paper.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, others: Sequence[str]) -> int:
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
        if code not in (0, cli.INTERRUPTED):
            return code
        runs += [run for run in [read_run(out)] if run is not None]
        if code:
            break
    if runs:
        write_report(runs, options.out)
    return code
