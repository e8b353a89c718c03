"""The speed report runs and writes what it says, at tiny sizes; its numbers are not judged here."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_quick_report(tmp_path):
    command = [sys.executable, "benchmarks/speed_report.py", "--quick", "--out", tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "LMF/CE" in run.stdout and "share of step" in run.stdout
    with (tmp_path / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["shape"] for row in rows] == ["32x8", "64x100", "2x5x16x16"]
    assert all(float(row["ratio"]) > 0 for row in rows)
    for row, count in zip(rows, (32, 64, 512), strict=True):  # the five statistics, loss and two denominators
        most = 20 + 64 / count
        assert 20 <= float(row["extra_bytes_per_row"]) <= most and row["extra_memory_kept"] == "True"
    for name in ("time_by_classes.png", "speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_benchmarks_of_one_shape(backend):
    """Fused, eager, compiled, F.cross_entropy and the peers that are installed."""
    options = ["--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "--backend", backend]
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-q", "-p", "no:cacheprovider", "-k", "32x8", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "benchmark '32x8': 6 tests" in run.stdout
