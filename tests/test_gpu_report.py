"""The part of benchmarks/gpu_report.py that needs a GPU, run on the CPU: every line but the timer."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gpu_report import CLASSES, report_times


def test_times_are_saved_and_plotted(tmp_path, capsys):
    def bench(run):
        run()
        return 2.0

    report_times(torch.device("cpu"), True, tmp_path, bench)
    assert "Measured on" in capsys.readouterr().out
    with (tmp_path / "gpu_times.csv").open() as file:
        rows = list(csv.DictReader(file))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    assert len(shapes) == len(CLASSES) + 1 and shapes[-1] == "2x5x16x16"
    assert {row["loss"] for row in rows} >= {"cross_entropy", "lmf fused", "lmf eager"}
    first = rows[0]  # (2^17, 2) float32: 1 MiB, moved three times in 2 ms
    assert float(first["GB/s"]) == pytest.approx(3 * 2**20 / 2e-3 / 1e9)
    assert (tmp_path / "gpu_times.png").read_bytes().startswith(b"\x89PNG")
