"""Every backend against the oracle over shapes, dtypes and options, every pair of which meets in some case."""

from __future__ import annotations

import pytest
import torch
from checks import DTYPES, INTERPRETED, accumulated, check
from pairwise import Case, pairwise

FACTORS = {
    "classes": (1, 2, 3, 7, 8, 9, 31, 1000, 8142),
    "rows": (0, 1, 2, 33, 1000),
    "gamma": (0.0, 0.5, 1.0, 1.5, 2.0, 5.0),
    "s": (1.0, 5.0, 30.0, 64.0),
    "dtype": DTYPES,
    "weights": ("none", "both", "ldam", "focal", "each"),
    "terms": ((1.3, 0.7), (1.3, 0.0), (0.0, 0.7)),
    "margins": ("none", "positive", "negative"),
    "reduction": ("none", "mean", "sum"),
    "ignored": ("nothing", "outside", "inside"),
}


def _small_enough(case: Case) -> bool:
    return not INTERPRETED or case.get("classes", 1) * case.get("rows", 1) <= 100_000


def _name(case: Case) -> str:
    return "-".join(str(value).replace("torch.", "") for value in case.values())


@pytest.mark.parametrize("case", pairwise(FACTORS, _small_enough), ids=_name)
def test_value_and_gradient(case, backend):
    rows, classes = case["rows"], case["classes"]
    logits = (3 * torch.randn(rows, classes)).to(case["dtype"])
    target = torch.randint(0, classes, (rows,))
    options = {name: case[name] for name in ("gamma", "s", "reduction")}
    options["alpha"], options["beta"] = case["terms"]

    if case["ignored"] != "nothing":
        options["ignore_index"] = classes // 2 if case["ignored"] == "inside" else 255 + 8142
        target[torch.rand(rows) < 0.3] = options["ignore_index"]
    if case["margins"] != "none":
        options["margins"] = torch.rand(classes) * (0.5 if case["margins"] == "positive" else -0.5)
    if case["weights"] == "both":
        options["weight"] = torch.rand(classes) + 0.1
    if case["weights"] in ("ldam", "each"):
        options["ldam_weight"] = torch.rand(classes, dtype=torch.float64) + 0.1
    if case["weights"] in ("focal", "each"):
        options["focal_weight"] = (torch.rand(classes) + 0.1).bfloat16()

    shape = (rows,) if case["reduction"] == "none" else ()
    grad_output = torch.randn(shape, dtype=accumulated(case["dtype"]))
    check(logits, target, backend, grad_output, **options)
