"""What a run leaves: results.json after each training; tables and pictures at the end."""

from collections.abc import Sequence
from dataclasses import asdict

import torch

from ..checkpoint import RESULTS
from ..data.split import describe_split
from ..experiment import Experiment
from ..output import write_json, write_text
from ..record import Record
from .paper_numbers import FILE
from .run import Run
from .times import time_table


def write_results(experiment: Experiment, records: Sequence[Record]) -> None:
    """Replace results.json in one step."""
    write_json(
        experiment.config.out / RESULTS,
        {
            "config": asdict(experiment.config),
            "torch": torch.__version__,
            "split": describe_split(experiment.samples, experiment.config.grouped),
            "class_names": experiment.samples.class_names,
            "class_counts": experiment.samples.counts.tolist(),
            "train_counts": experiment.train_counts,
            "records": [record.as_json() for record in records],
        },
    )


def finish(experiment: Experiment, records: Sequence[Record]) -> None:
    """Print the tables; write them as Markdown and CSV, and the pictures."""
    from . import plots  # matplotlib is slow to import

    config = experiment.config
    out, paper = config.out, experiment.paper
    run = Run(
        dataset=config.data.partition(":")[0],
        model=config.model,
        split=describe_split(experiment.samples, config.grouped),
        class_names=experiment.samples.class_names,
        train_counts=experiment.train_counts,
        records=records,
        paper=paper,
    )
    first, second = run.table_1(), run.table_2()
    print(f"\n{first.text()}\n\n{second.text()}\n\n{time_table(run)}\n", flush=True)
    if paper is not None and not paper.losses:
        print(f"{FILE.name} has no numbers of the paper for these data and this model to show beside these\n")
    write_results(experiment, records)
    write_text(out / "tables.md", f"{first.markdown()}\n\n{second.markdown()}\n")
    write_text(out / "table_1.csv", first.csv())
    write_text(out / "table_2.csv", second.csv())
    for name, plot in plots.PICTURES.items():
        plot(run, out / name)
    if config.grad_cam and (overlays := experiment.overlays()):
        plots.plot_overlays(*experiment.gallery(), overlays, out / "grad_cam.png")
    print(f"wrote {out}: results.json, the tables (.md, .csv), curves.png, per_class_f1.png and more pictures")
