"""The training benchmark as a user runs it: its output, its files, and what it says to wrong input."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from training import cli
from training.losses import LABELS
from training.options import parse

ROOT = Path(__file__).resolve().parents[3]
FILES = {
    *("results.json", "tables.md", "table_1.csv", "table_2.csv"),
    *("curves.png", "per_class_f1.png", "rare_f1.png", "confusion.png"),
}
TINY = ["--seeds", "1", "--epochs", "2"]


def make_images(folder: Path, classes: dict[str, int], size: int = 12) -> Path:
    """Class folders of PNGs whose colour tells the class."""
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., label % 3] += 120
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """One short run with all losses: its folder."""
    out = tmp_path_factory.mktemp("digits") / "new" / "results"
    assert cli.main([*TINY, "--seeds", "2", "--out", str(out)]) == 0
    return out


def test_results_hold_a_record_for_each_loss_and_seed(digits_run):
    results = json.loads((digits_run / "results.json").read_text())
    assert results["class_names"] == ["0-3", "4", "5", "6", "7", "8", "9"]
    assert results["train_counts"] == [504, 84, 83, 39, 25, 11, 9]
    assert results["config"]["protocol"]["epochs"] == 2
    assert results["config"]["loss_options"]["lmf"]["gamma"] == 1.5
    keys = [(record["loss"], record["seed"]) for record in results["records"]]
    assert sorted(keys) == sorted((loss, seed) for loss in LABELS for seed in (0, 1))
    for record in results["records"]:
        assert len(record["per_class_f1"]) == 7
        assert math.isclose(record["macro_f1"], sum(record["per_class_f1"]) / 7, abs_tol=1e-12)
        for key in ("accuracy", "precision", "recall"):
            assert 0 <= record[key] <= 1
        assert record["images_per_second"] > 0 and record["loss_ms"] > 0
        assert len(record["history"]["val_macro_f1"]) == 2


def test_pictures_are_written(digits_run):
    assert {path.name for path in digits_run.iterdir()} == FILES
    for name in (name for name in FILES if name.endswith(".png")):
        with Image.open(digits_run / name) as image:
            assert image.width >= 800 and len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_fused_and_eager_lmf_train_alike(digits_run):
    records = json.loads((digits_run / "results.json").read_text())["records"]
    first_loss = {(r["loss"], r["seed"]): r["history"]["train_loss"][0] for r in records}
    for seed in (0, 1):
        assert math.isclose(first_loss["lmf", seed], first_loss["lmf-eager", seed], rel_tol=1e-3)
        assert not math.isclose(first_loss["lmf", seed], first_loss["ldam", seed], rel_tol=1e-2)


def test_the_same_command_gives_the_same_numbers(tmp_path, digits_run):
    assert cli.main([*TINY, "--losses", "ce", "--out", str(tmp_path)]) == 0
    (again,) = json.loads((tmp_path / "results.json").read_text())["records"]
    before = json.loads((digits_run / "results.json").read_text())["records"][0]
    assert again["history"] == before["history"] and again["confusion"] == before["confusion"]


def test_tables_are_printed(tmp_path, capsys):
    assert cli.main([*TINY, "--losses", "lmf", "lmf-eager", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for expected in ("Table 1", "Macro F1", "Table 2", "0-3 (504)", "9 (9)", "images/s", "loss ms/step"):
        assert expected in text
    assert re.search(r"LMF fused against eager: loss [\d.]+ against [\d.]+ ms a step", text)


@pytest.mark.parametrize("layout", ["flat", "parts"])
def test_image_folders(tmp_path, layout, capsys):
    classes = {"cat": 20, "dog": 8, "eel": 4}
    for part in ("train", "val", "test") if layout == "parts" else ("",):
        make_images(tmp_path / "images" / part, classes)
    spec = f"imagefolder:{tmp_path / 'images'}"
    options = ["--model", "small_cnn", "--image-size", "8", "--losses", "ce", "lmf", "--workers", "1"]
    assert cli.main(["--data", spec, *options, *TINY, "--epochs", "6", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["class_names"] == list(classes)
    assert results["train_counts"] == ([14, 6, 2] if layout == "flat" else [20, 8, 4])
    assert results["records"][0]["accuracy"] > 0.5  # the colour tells the class


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet50", "efficientnet_v2_s", "densenet121"])
def test_torchvision_models_train(tmp_path, model):
    images = make_images(tmp_path / "images", {"cat": 9, "dog": 4})
    options = ["--model", model, "--image-size", "32", "--losses", "lmf", "--workers", "0"]
    command = ["--data", f"imagefolder:{images}", *options, *TINY, "--epochs", "1", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0


def test_image_folders_follow_the_paper_by_default(tmp_path):
    config = parse(["--data", "imagefolder:x", "--out", str(tmp_path)])
    protocol = config.protocol
    assert config.model == "resnet50" and protocol.image_size == 224
    assert (protocol.epochs, protocol.batch_size, protocol.lr, protocol.weight_decay) == (100, 32, 1e-4, 5e-4)
    assert (protocol.lr_step, protocol.lr_gamma) == (30, 0.1)


def assert_refused(arguments: list[str], out: Path, capsys, *expected: str) -> None:
    """Exit code 2, one sentence that says all of ``expected``, and no output folder."""
    assert cli.main([*arguments, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.rstrip("\n").split("\r")[-1]
    assert message.startswith("train.py: error: ") and "\n" not in message
    for text in expected:
        assert text in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "mnist"], ["mnist", "digits", "imagefolder:PATH"]),
        (["--data", "digits:0"], ["digits:0", "from 1 to 100"]),
        (["--data", "imagefolder"], ["imagefolder:PATH"]),
        (["--data", "imagefolder:/no/such/folder"], ["/no/such/folder", "no such folder"]),
        (["--model", "vgg"], ["--model", "vgg", "small_cnn"]),
        (["--weights", "DEFAULT"], ["small_cnn has no pretrained weights"]),
        (["--model", "resnet50", "--weights", "V9"], ["V9", "IMAGENET1K_V2"]),
        (["--losses", "hinge"], ["hinge", "ldam"]),
        (["--seeds", "0"], ["--seeds", "'0'", "at least 1"]),
        (["--epochs", "two"], ["--epochs", "'two'"]),
        (["--lr", "-1"], ["--lr", "'-1'"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--weight-decay", "-1"], ["--weight-decay"]),
        (["--image-size", "2"], ["--image-size 2", "at least 4"]),
        (["--lmf-s", "0"], ["loss lmf", "s "]),
        (["--focal-gamma", "-1"], ["loss focal", "gamma"]),
        (["--lmf-class-weights", "heavy"], ["heavy", "inverse"]),
        (["--device", "warp"], ["--device warp"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
)
def test_wrong_options(tmp_path, capsys, arguments, expected):
    assert_refused(arguments, tmp_path / "out", capsys, *expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a CUDA device")
def test_many_classes(capsys):
    assert cli.main(["many-classes", "--classes", "500", "--features", "8", "--batch", "64", "--rounds", "3"]) == 0
    title, head, _, *rows, gain = capsys.readouterr().out.splitlines()
    assert title == "Linear classifier 8 -> 500, batch 64, 3 rounds"
    assert re.split(r"  +", head) == ["Loss", "step ms", "loss ms", "share of step"]
    cells = [re.split(r"  +", row) for row in rows]
    assert [name for name, *_ in cells] == ["cross_entropy", "lmf fused", "lmf eager"]
    for _, step, part, share in cells:
        assert 0 <= float(part) <= float(step)
        assert 0 < float(share.removesuffix("%")) <= 100
    assert gain.startswith("Whole step with fused LMF: ")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--classes", "0", "--classes"), ("--rounds", "x", "--rounds"), ("--device", "cuda:9", "--device cuda:9")],
)
def test_many_classes_with_wrong_options(option, value, said, capsys):
    assert cli.main(["many-classes", option, value]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


OPTIONS = {
    "": "config data model weights head losses seeds grouped no-grouped strict no-strict device workers threads "
    "tensorboard grad-cam resume checkpoint-seconds out amp channels-last compile epochs batch-size lr weight-decay "
    "lr-step lr-gamma image-size wce-class-weights focal-gamma focal-class-weights ldam-max-m ldam-s "
    "ldam-class-weights lmf-alpha lmf-beta lmf-gamma lmf-max-m lmf-s lmf-class-weights",
    "many-classes": "device features classes batch rounds",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert set(re.findall(r"--([a-z][a-z-]+) ", text)) >= set(OPTIONS[command].split())
    assert "function" not in text  # the name of a converter, where that of a value belongs


def test_missing_device(tmp_path, capsys):
    assert_refused(["--device", "cuda"], tmp_path / "out", capsys, "--device cuda")


def test_out_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert cli.main(["--out", str(tmp_path / "file" / "sub")]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_empty_class_folder(tmp_path, capsys):
    images = make_images(tmp_path / "images", {"cat": 4, "dog": 4, "eel": 0})
    assert_refused(["--data", f"imagefolder:{images}"], tmp_path / "out", capsys, str(images / "eel"), "no images")


def test_folder_without_classes(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    arguments = ["--data", f"imagefolder:{tmp_path / 'images'}"]
    assert_refused(arguments, tmp_path / "out", capsys, "no class folders")


def test_class_with_two_images(tmp_path, capsys):
    images = make_images(tmp_path / "images", {"cat": 4, "dog": 2})
    arguments = ["--data", f"imagefolder:{images}"]
    assert_refused(arguments, tmp_path / "out", capsys, "'dog' has 2 images", "at least 3")


def test_single_class(tmp_path, capsys):
    images = make_images(tmp_path / "images", {"cat": 4})
    assert_refused(["--data", f"imagefolder:{images}"], tmp_path / "out", capsys, "at least 2")


def test_parts_with_other_classes(tmp_path, capsys):
    for part, names in {"train": "ab", "val": "ab", "test": "ac"}.items():
        make_images(tmp_path / "images" / part, dict.fromkeys(names, 3))
    arguments = ["--data", f"imagefolder:{tmp_path / 'images'}"]
    assert_refused(arguments, tmp_path / "out", capsys, "class folders of test (a, c)")


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_unreadable_image(tmp_path, capsys, damage):
    images = make_images(tmp_path / "images", {"cat": 6, "dog": 6}, size=64)
    bad = images / "dog" / "3.png"
    whole = bad.read_bytes()
    bad.write_bytes({"text": b"no image", "truncated": whole[: len(whole) // 2], "empty": b""}[damage])
    arguments = ["--data", f"imagefolder:{images}", "--model", "small_cnn", "--image-size", "8", "--workers", "0"]
    assert_refused(arguments, tmp_path / "out", capsys, str(bad), "cannot be read", "--no-strict")

    tolerant = [*arguments, "--no-strict", "--losses", "ce", *TINY, "--out", str(tmp_path / "out")]
    assert cli.main(tolerant) == 0
    assert "left out 1 of 12 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["class_counts"] == [6, 5]


def test_pretrained_weights_when_offline(tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    arguments = ["--model", "resnet50", "--weights", "IMAGENET1K_V2"]
    assert_refused(arguments, tmp_path / "out", capsys, "IMAGENET1K_V2", "could not be downloaded", "--weights")


def test_exit_code_of_the_process(tmp_path):
    command = [sys.executable, "benchmarks/train.py", "--data", "imagefolder:nowhere", "--out", str(tmp_path / "out")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "train.py: error: --data imagefolder:nowhere: there is no such folder\n"


def test_ctrl_c_keeps_the_finished_trainings(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "benchmarks/train.py", "--epochs", "1", "--seeds", "9999", "--losses", "ce"]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        finished = 0
        while finished < 3 and process.poll() is None:
            finished += "test macro F1" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "interrupted" in errors
    records = json.loads((out / "results.json").read_text())["records"]
    assert len(records) >= 3
    assert "Table 1" in rest
    assert {path.name for path in out.iterdir()} == FILES


def test_training_on_tables_and_digits_needs_no_torchvision(tmp_path):
    """`make train` installs none; models and images that need it say so."""
    code = "import sys; sys.modules['torchvision'] = None; from training.cli import main; sys.exit(main(sys.argv[1:]))"
    run = [sys.executable, "-c", code]
    arguments = [*TINY, "--out", str(tmp_path / "out")]
    options = dict(cwd=ROOT / "benchmarks", capture_output=True, text=True)
    losses = ["--losses", "ce"]
    assert subprocess.run([*run, *arguments, *losses], **options).returncode == 0
    images = make_images(tmp_path / "images", {"a": 12, "b": 12})
    for more, what in ((["--model", "resnet50"], "--model resnet50"), (["--data", f"imagefolder:{images}"], "--data")):
        refused = subprocess.run([*run, *arguments, *more], **options)
        assert refused.returncode == 2, refused.stderr
        assert what in refused.stderr and "needs the package torchvision: pip install torchvision" in refused.stderr
