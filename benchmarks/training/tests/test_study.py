"""The study: its grid, how it chooses, what it writes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from training.experiment import Experiment
from training.options import parse
from training.study import command as study
from training.study.grid import Point, cosine_points, grid
from training.study.report import complete, frame, is_default, over_seeds, read_records, tables, winners
from training.study.terms import follow


def test_grid_has_every_loss_and_the_papers_values():
    points = grid()
    assert set(Counter(point.loss for point in points)) == {"ce", "wce", "focal", "ldam", "lmf"}
    assert len(set(points)) == len(points)
    for loss in ("ce", "wce", "focal", "ldam", "lmf"):
        own = [{"loss": loss, "options": point.describe()} for point in points if point.loss == loss]
        assert sum(map(is_default, own)) == 2  # one for each learning rate
    assert {point.options.lmf.s for point in points if point.loss == "lmf"} == {1.0, 5.0, 10.0, 30.0}
    assert all(point.head == "cosine" for point in cosine_points())


def made_record(seed: int, val: float, test: float, s: float = 30.0) -> dict:
    options = Point("ldam", 1e-3).describe() | {"s": s}
    return {"data": "digits", "seed": seed, "loss": "ldam", "options": options, "val_macro_f1": val, "macro_f1": test}


def test_validation_chooses_and_ties_share():
    records = [made_record(0, 0.9, 0.5), made_record(0, 0.8, 0.99), made_record(1, 0.7, 0.4), made_record(1, 0.7, 0.6)]
    assert winners(frame(records[:2])).macro_f1.tolist() == [0.5]  # not the best on test
    assert winners(frame(records[2:])).macro_f1.tolist() == [0.4, 0.6]
    points = frame(records)
    both = over_seeds("Made", points, {"all": points.seed >= 0, "some": (points.seed == 0) | (points.macro_f1 > 0.5)})
    assert both.mean.squeeze().tolist() == pytest.approx([0.5, 0.55])
    assert both.deviation.squeeze().tolist() == pytest.approx([0, 0.1 / 2**0.5])


def test_unfinished_seeds_are_left_out():
    records = [made_record(seed, 0.5, 0.5) for seed in (0, 0, 1, 1, 2)]
    assert set(complete(frame(records)).seed) == {0, 1}


def test_training_of_a_point_is_the_benchmarks(tmp_path):
    table = tmp_path / "made.dat"
    rng = np.random.default_rng(0)
    rows = [f"{rng.normal(label, 0.3):.3f}, {rng.normal():.3f}, {'ab'[label]}" for label in (0, 1) for _ in range(20)]
    table.write_text("@data\n" + "\n".join(rows) + "\n")
    point = next(point for point in grid() if point.loss == "lmf" and point.options.lmf.s == 5)
    record = study.train(study.Job(f"keel:{table}", 3, point))
    config = parse(
        ["--data", f"keel:{table}", "--losses", "lmf", *study.PROTOCOL, "--lmf-s", "5", "--lr", str(point.lr)]
    )
    (expected,) = Experiment(replace(config, seeds=(3,))).runs(quiet=True)
    assert record["macro_f1"] == expected.outcome.test.macro_f1 > 0.8
    assert record["val_macro_f1"] == expected.outcome.best_val_macro_f1
    assert record["options"]["s"] == 5 and record["seed"] == 3


def test_terms_change_places():
    """With s = 30 LDAM starts the training and leaves the end to focal; with s = 1 it never does."""
    large, small = (follow(study._lmf_at_scale(s)).ldam_share for s in (30.0, 1.0))
    assert large[0] > 0.85 and large[-1] < 0.2
    assert small[-1] > 0.8


@pytest.mark.slow
def test_study_writes_its_report_and_resumes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    table = tmp_path / "made.dat"
    rows = [f"{rng.normal(label, 0.5):.3f}, {rng.normal():.3f}, {'ab'[label]}" for label in (0, 1) for _ in range(20)]
    table.write_text("@data\n" + "\n".join(rows) + "\n")
    arguments = ["--data", f"keel:{table}", "--seeds", "1", "--jobs", "2", "--out", str(tmp_path / "out")]
    assert study.main(arguments) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("study.json", "study.md", "study_scale.png", "study_terms.png")
    }
    records = read_records(tmp_path / "out" / "study.json")
    assert len(records) == len(grid()) and len(tables(frame(records))) == 6
    before = (tmp_path / "out" / "study.json").read_text()
    assert study.main(arguments) == 0  # nothing is left to do
    assert (tmp_path / "out" / "study.json").read_text() == before


def test_study_refuses_unknown_data(capsys):
    assert study.main(["--data", "nothing", "--seeds", "1", "--jobs", "1", "--out", "unused"]) == 2
    assert "study.py: error: --data 'nothing' is unknown" in capsys.readouterr().err
