"""An honest comparison on data that need no download: hyper-parameters are chosen on validation, for each seed anew."""

import json
import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..arguments import CORES, Parser, exit_code, option, positive, several
from ..data.readers import read
from ..experiment import Experiment
from ..options import parse
from ..output import write_json
from .grid import LEARNING_RATES, SCALES, Point, cosine_points, grid
from .report import read_records, write_report
from .terms import follow, plot_terms

# Batches of 64 cost half of the benchmark's default.
PROTOCOL = ("--epochs", "30", "--batch-size", "64", "--lr-step", "20", "--threads", "1")
DATASETS = ("digits", "digits:20", "keel:cleveland", "keel:dermatology", "keel:newthyroid")


@dataclass(frozen=True)
class Options:
    """How much of the study is run, and where it goes."""

    data: tuple[str, ...] = several(DATASETS, "datasets of train.py")
    seeds: int = option(5, "how many: 0, 1, ...", type=positive)
    jobs: int = option(CORES, "processes, one thread each", type=positive)
    out: Path = option(Path("results/study"), "folder of study.json")
    report: Path = option(None, "folder of study.md and the pictures; None: --out")


@dataclass(frozen=True)
class Job:
    """One training of the study."""

    data: str
    seed: int
    point: Point


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing of the study and write study.json; returns the exit code."""

    def run() -> int:
        parser = Parser(prog="study.py", description=__doc__)
        parser.add_arguments(Options, "options")
        return _run(parser.parse_args(argv).options)

    return exit_code("study.py", run)


def _run(options: Options) -> int:
    for data in options.data:
        read(data).check()
    path = options.out / "study.json"
    records = read_records(path)
    done = {_key(record) for record in records}
    points = grid()
    jobs = [
        Job(data, seed, point)
        for seed in range(options.seeds)
        for data in options.data
        for point in points + (cosine_points() if data.startswith("digits") else [])
    ]
    missing = [job for job in jobs if _key(_describe(job)) not in done]
    try:
        for record in _train_all(missing, options.jobs):
            records.append(record)
            if len(records) % 50 == 0:
                write_json(path, records)
    finally:
        if records:
            write_json(path, records)
    folder = options.report or options.out
    write_report(records, folder)
    plot_terms({s: follow(_lmf_at_scale(s)) for s in SCALES}, folder / "study_terms.png")
    print(f"{path}: {len(records)} trainings; wrote study.md, study_scale.png and study_terms.png in {folder}")
    return 0


def _lmf_at_scale(s: float) -> Experiment:
    lr = str(max(LEARNING_RATES))
    return Experiment(parse(["--losses", "lmf", *PROTOCOL, "--lr", lr, "--seeds", "1", "--lmf-s", str(s)]))


def _train_all(jobs: Sequence[Job], processes: int) -> Iterable[dict[str, Any]]:
    if not jobs:
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from tqdm(pool.imap_unordered(train, jobs), total=len(jobs), unit="training", dynamic_ncols=True)
        pool.close()
        pool.join()


def train(job: Job) -> dict[str, Any]:
    """One training as a record: what was trained, the validation score it is chosen by, the test metrics."""
    config = parse(["--data", job.data, "--losses", job.point.loss, *PROTOCOL])
    config = replace(
        config,
        seeds=(job.seed,),
        checkpoint_seconds=float("inf"),
        head=job.point.head,
        loss_options=job.point.options,
        protocol=replace(config.protocol, lr=job.point.lr),
    )
    (record,) = Experiment(config).runs(quiet=True)
    outcome = record.outcome
    return {
        **_describe(job),
        "val_macro_f1": outcome.best_val_macro_f1,
        "last_val_macro_f1": outcome.history.val_macro_f1[-1],
        "accuracy": outcome.test.accuracy,
        "macro_f1": outcome.test.macro_f1,
        "per_class_f1": outcome.test.per_class_f1,
    }


def _describe(job: Job) -> dict[str, Any]:
    return {
        "data": job.data,
        "seed": job.seed,
        "loss": job.point.loss,
        "options": job.point.describe(),
    }


def _key(record: dict[str, Any]) -> str:
    keys = ("data", "seed", "loss", "options")
    return json.dumps({key: record[key] for key in keys}, sort_keys=True)
