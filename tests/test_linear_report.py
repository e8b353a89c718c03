"""The report of linear heads runs, checks what it times and counts more memory for kept logits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checks import INTERPRETED

from lmf_kernels.linear import chunks


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's process tests Triton alone")
def test_quick_report(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import linear_report

    monkeypatch.setattr(linear_report, "QUICK", [((512, 16, 20_000), linear_report.torch.float32)])
    monkeypatch.setattr(chunks, "MEMORY_BUDGET", 64 * 20_000 * 4)
    assert linear_report.main(["--quick", "--rounds", "1"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    parts = {row[0]: float(row[4].removesuffix("%")) for row in rows if re.fullmatch(r"[\d.]+%", row[-1])}
    assert parts["Linear + F.cross_entropy"] > parts["Linear + lmf_loss"] > 150
    assert 12 < parts["linear_lmf_loss"] < 20
