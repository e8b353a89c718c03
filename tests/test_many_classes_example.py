"""examples/many_classes.py runs as a user would, at reduced size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from checks import INTERPRETED

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter's process tests Triton alone"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed"),
]


def test_many_classes():
    """Two processes learn the classes; with the features' gradient of one of them alone they would not."""
    size = ["--classes", "601", "--features", "32", "--batch", "128", "--steps", "60", "--every", "30"]
    result = subprocess.run(
        [sys.executable, ROOT / "examples/many_classes.py", *size],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "601 classes over 2 processes: (301, 300)"
    steps = [re.fullmatch(r"step (\d+): loss ([\d.]+), accuracy ([\d.]+)", line).groups() for line in lines[1:]]
    assert [int(step) for step, _, _ in steps] == [1, 30, 60]
    assert float(steps[-1][2]) > 0.5 > float(steps[0][2])
    assert float(steps[-1][1]) < float(steps[0][1]) / 2
