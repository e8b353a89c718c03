"""The examples run as they are, small: the loss falls and what was learned is better than chance."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lmf_kernels import LMFLoss

EXAMPLES = Path(__file__).parents[1] / "examples"
SLOW = {  # script -> the package that it shows, arguments, and what its metric must reach (chance: 0.1)
    "lightning_module": ("lightning", "--epochs 8 --size 60", 0.4),
    "huggingface_trainer": ("transformers", "--epochs 20 --size 60", 0.3),
    "timm_loop": ("timm", "--epochs 6 --size 60", 0.4),
    "monai_segmentation": ("monai", "--epochs 4 --size 20", 0.3),
}

needs_distributed = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")


def python(*arguments):
    """What a new Python prints that finds the package and the examples."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    paths = [str(EXAMPLES.parent), str(EXAMPLES), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.splitlines()


def run(name, arguments):
    """First loss, last loss and the metric that the example prints last."""
    last = python(str(EXAMPLES / f"{name}.py"), *arguments.split())[-1]
    found = re.fullmatch(r"loss ([\d.]+) -> ([\d.]+), [\w ]+ ([\d.]+)", last)
    assert found, last
    return [float(number) for number in found.groups()]


def test_plain_pytorch():
    first, last, accuracy = run("pytorch_loop", "--epochs 8 --size 60")
    assert last < 0.5 * first and accuracy > 0.5


@needs_distributed
def test_many_classes():
    """Two processes learn the classes; the commonest of them is a seventh of the samples."""
    first, last, accuracy = run("many_classes", "--classes 601 --features 32 --batch 128 --steps 60 --lr 1e-2")
    assert last < 0.5 * first and accuracy > 0.6


@needs_distributed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_many_classes_ends_its_threads(tmp_path):
    """A thread of gloo that is left when the interpreter ends may abort the process; seldom, so the threads count."""
    code = (
        "import os, sys, many_classes; many_classes._process(0, many_classes.parse(sys.argv[2:]), sys.argv[1]); "
        "print([open(f'/proc/self/task/{task}/comm').read() for task in os.listdir('/proc/self/task')])"
    )
    options = ["--processes", "1", "--classes", "31", "--features", "8", "--batch", "16", "--steps", "1"]
    threads = python("-c", code, str(tmp_path / "store"), *options)[-1]
    assert "python" in threads and "gloo" not in threads


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SLOW))
def test_trainer(name):
    package, arguments, reached = SLOW[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package} (requirements-dev.txt)")
    first, last, metric = run(name, arguments)
    assert last < 0.8 * first and metric > reached


def test_every_example_is_tested():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}
    assert scripts == {"pytorch_loop", "many_classes", *SLOW}


@pytest.mark.slow
def test_hugging_face_trainer_accumulates_the_joint_gradient(tmp_path):
    """What the example says: uneven micro-batches with `num_items_in_batch` step like one batch."""
    transformers = pytest.importorskip("transformers", reason="needs transformers and accelerate")
    x, y = torch.randn(24, 6), torch.randint(0, 4, (24,))
    y[20:] = -100
    criterion = LMFLoss([500, 80, 9, 40], s=3.0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(6, 4)

        def forward(self, x):
            return {"logits": self.layer(x)}

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return criterion(outputs["logits"], labels, normalizer=num_items_in_batch)

    stepped = []
    for size, accumulated in ((24, 1), (16, 2)):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_grad_norm=0.0,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        )  # fmt: skip
        data = [{"x": row, "labels": label} for row, label in zip(x, y, strict=True)]
        trainer = transformers.Trainer(Model(), arguments, train_dataset=data, compute_loss_func=compute_loss)
        trainer.train()
        stepped.append(trainer.model.layer.weight.detach())

    model = Model()
    criterion(model(x)["logits"], y).backward()
    want = model.layer.weight.detach() - 0.1 * model.layer.weight.grad
    for weight in stepped:
        torch.testing.assert_close(weight, want)
