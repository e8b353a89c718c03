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

from lmf_kernels import LMFLoss

EXAMPLES = Path(__file__).parents[1] / "examples"
SLOW = {  # script -> the package that it shows, arguments, and what its metric must reach (chance: 0.1)
    "lightning_module": ("lightning", "--epochs 8 --size 60", 0.4),
    "huggingface_trainer": ("transformers", "--epochs 20 --size 60", 0.3),
    "timm_loop": ("timm", "--epochs 6 --size 60", 0.4),
    "monai_segmentation": ("monai", "--epochs 4 --size 20", 0.3),
}


def run(name, arguments):
    """First loss, last loss and the metric that the example prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(EXAMPLES.parent), environment.get("PYTHONPATH")]))
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments.split()]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    last = finished.stdout.splitlines()[-1]
    found = re.fullmatch(r"loss ([\d.]+) -> ([\d.]+), [\w ]+ ([\d.]+)", last)
    assert found, last
    return [float(number) for number in found.groups()]


def test_plain_pytorch():
    first, last, accuracy = run("pytorch_loop", "--epochs 8 --size 60")
    assert last < 0.5 * first and accuracy > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SLOW))
def test_trainer(name):
    package, arguments, reached = SLOW[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package} (requirements-dev.txt)")
    first, last, metric = run(name, arguments)
    assert last < 0.8 * first and metric > reached


def test_every_example_is_tested():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits", "many_classes"}
    assert scripts == {"pytorch_loop", *SLOW}


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
