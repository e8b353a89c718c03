"""The paper's tables: its numbers beside ours, and one command over its three datasets."""

import csv
from collections.abc import Sequence

import pandas as pd
import pytest
from PIL import Image

from training import cli
from training.data.readers import ham10000, isic2019, odir5k
from training.errors import UserError
from training.paper import command as paper
from training.report.paper_numbers import FILE, PaperNumbers, paper_numbers
from training.report.tables import Table
from training.toml import read_toml

from .published_formats import make_ham10000, make_isic2019, make_odir5k

MADE = """
[ham10000.resnet50.ce]
accuracy = 0.25
macro_f1 = 0.125
per_class_f1 = { NV = 0.75 }

[ham10000.resnet50.lmf]
macro_f1 = 0.5
"""
HAM_CLASSES = [name.upper() for name in ham10000.CLASSES]


@pytest.fixture
def made_numbers(tmp_path):
    file = tmp_path / "numbers.toml"
    file.write_text(MADE)
    return file


def test_numbers_are_those_of_the_dataset_and_the_model(made_numbers):
    numbers = paper_numbers("ham10000:folder", "resnet50", HAM_CLASSES, made_numbers)
    assert numbers.metric("ce", "macro_f1") == 0.125 and numbers.metric("ce", "recall") is None
    assert numbers.metric("lmf", "macro_f1") == numbers.metric("lmf-eager", "macro_f1") == 0.5
    assert numbers.class_f1("ce", "NV") == 0.75 and numbers.class_f1("lmf", "NV") is None
    assert paper_numbers("ham10000:folder", "densenet121", HAM_CLASSES, made_numbers) == PaperNumbers()
    assert paper_numbers("digits", "resnet50", HAM_CLASSES, made_numbers) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[ham10000.resnet50.hinge]", "the loss is unknown"),
        ("[ham10000.resnet50.ce]\nf1 = 0.5", "unknown key f1"),
        ("[ham10000.resnet50.ce]\naccuracy = 75.0", "not percent"),
        ("[ham10000.resnet50.ce]\nper_class_f1 = { wart = 0.5 }", "unknown class wart"),
        ("[ham10000", "is not a TOML file"),
    ],
)
def test_wrong_numbers(tmp_path, text, expected):
    (tmp_path / "numbers.toml").write_text(text)
    with pytest.raises(UserError, match=expected):
        paper_numbers("ham10000:folder", "resnet50", HAM_CLASSES, tmp_path / "numbers.toml")


@pytest.mark.parametrize(("dataset", "reader"), [("ham10000", ham10000), ("isic2019", isic2019), ("odir5k", odir5k)])
def test_the_shipped_file_is_right_for_every_model(dataset, reader):
    names = [name.upper() for name in reader.CLASSES]
    for model in {*read_toml(FILE).get(dataset, {}), "resnet50"}:
        assert paper_numbers(dataset, model, names) is not None


def test_the_papers_number_is_beside_ours():
    columns, losses = ["Accuracy", "F1"], pd.Index(["CE", "CE", "LMF", "LMF"], name="Loss")
    values = pd.DataFrame([[0.5, 0.5], [0.7, 0.5], [0.2, 0.75], [0.2, 0.75]], losses, columns)
    paper = pd.DataFrame([[0.25, None], [None, 1.0]], losses.unique(), columns, dtype=float)
    table = Table.over_seeds("Made", values, paper)
    title, head, _, first, second = table.text().splitlines()
    assert title == "Made; in brackets the paper's (* best)" and "(" not in head
    assert first.split() == ["CE", "0.600", "±", "0.141*", "(0.250)", "0.500", "±", "0.000"]
    assert second.split() == ["LMF", "0.200", "±", "0.000", "0.750", "±", "0.000*", "(1.000)"]
    assert first.index("±") == second.index("±")
    assert table.markdown().splitlines()[-2] == "| CE | **0.600 ± 0.141** (0.250) | 0.500 ± 0.000 |"
    lines = list(csv.DictReader(table.csv().splitlines()))
    assert [line["Accuracy paper"] for line in lines] == ["0.25", ""] and lines[1]["F1 paper"] == "1.0"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All three datasets, small, in their published formats."""
    root = tmp_path_factory.mktemp("data")
    make_ham10000(root / "ham10000", _tail(ham10000.CLASSES), ["HAM10000_images_part_1", "HAM10000_images_part_2"])
    make_isic2019(root / "isic2019", _tail(isic2019.CLASSES))
    make_odir5k(root / "odir5k", _tail(odir5k.CLASSES))
    return root


def _tail(classes: Sequence[str]) -> list[str]:
    """Fewer and fewer images of each class, from 14 on."""
    return [name for rank, name in enumerate(classes) for _ in range(max(6, 14 - 2 * rank))]


TINY = ["--model", "small_cnn", "--weights", "none", "--image-size", "16", "--epochs", "2", "--workers", "0"]


def test_one_command_makes_the_papers_tables(data, tmp_path, capsys, made_numbers, monkeypatch):
    made_numbers.write_text(MADE.replace("resnet50", "small_cnn"))
    monkeypatch.setattr("training.report.paper_numbers.read_toml", lambda path: read_toml(made_numbers))
    out = tmp_path / "out"
    command = ["--data", str(data), "--models", "resnet50", "--out", str(out), *TINY]
    assert paper.main([*command, "--losses", "ce", "--seeds", "2"]) == 0
    first = capsys.readouterr().out
    assert "warning: HAM10000 is not complete: 62 of 10015 published images (NV 14 of 6705" in first
    assert "images of one lesion leak from training into test (as in the paper)" in first
    assert "paper_numbers.toml has no numbers of the paper" in first  # for the other two datasets

    assert paper.main([*command, "--losses", "ce", "lmf", "--seeds", "2", "--grad-cam"]) == 0  # goes on from there
    text = capsys.readouterr().out
    assert text.count("resumed: 2 trainings were finished before") == 3
    for title in ("HAM10000", "ISIC-2019", "ODIR-5K"):
        assert f"Table 1. {title}, small_cnn: test metrics" in text
        assert f"Table 2. {title}, small_cnn: test F1 per class" in text
    assert "split of ISIC-2019, small_cnn: stratified 70:15:15, drawn with each seed, not grouped: the data do" in text
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        *("table_1.md", "table_1.csv", "table_2.md", "table_2.csv", "figure_1.png")
    }
    lines = list(csv.DictReader((out / "table_1.csv").read_text().splitlines()))
    assert len(lines) == 3 * 2 * 4
    (ours,) = [line for line in lines if (line["dataset"], line["loss"], line["column"]) == _HAM_CE_F1]
    own = list(csv.DictReader((out / "ham10000-resnet50" / "table_1.csv").read_text().splitlines()))
    assert (ours["mean"], ours["deviation"]) == (own[0]["Macro F1 mean"], own[0]["Macro F1 deviation"])
    assert ours["paper"] == own[0]["Macro F1 paper"] == "0.125"
    lines = list(csv.DictReader((out / "table_2.csv").read_text().splitlines()))
    assert len(lines) == 2 * (7 + 8 + 8) and lines[0]["column"] == "NV (10)" and lines[0]["paper"] == "0.75"
    for picture in (out / "figure_1.png", out / "isic2019-resnet50" / "grad_cam.png"):
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20


_HAM_CE_F1 = ("HAM10000", "Cross-entropy", "Macro F1")


def test_missing_data_are_told_before_the_first_training(data, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ham10000").symlink_to(data / "ham10000")
    command = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *TINY]
    assert paper.main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and not (tmp_path / "out").exists()
    assert captured.err.startswith("paper.py: error: --data isic2019:") and captured.err.count("\n") == 1
    assert paper.main(["--datasets", "mnist"]) == 2
    assert "'mnist'" in capsys.readouterr().err
    assert paper.main([*command, "--datasets", "ham10000", "--losses", "hinge"]) == 2
    assert "train.py: error: argument --losses: invalid choice: 'hinge'" in capsys.readouterr().err


def test_grouped_runs_say_so(data, tmp_path, capsys):
    command = ["--data", f"odir5k:{data / 'odir5k'}", *TINY, "--epochs", "1", "--seeds", "1", "--losses", "ce"]
    code = cli.main([*command, "--grouped", "--out", str(tmp_path)])
    assert code == 0, capsys.readouterr().err
    assert "grouped: all images of a patient are in one part" in capsys.readouterr().out
