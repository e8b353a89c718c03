"""The examples run as they are, small: the loss falls and what was learned is better than chance."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}
    assert scripts == {"pytorch_loop", *SLOW}
