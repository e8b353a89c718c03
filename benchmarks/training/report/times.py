"""The share of time that the loss takes, as text."""

import pandas as pd

from ..losses import LABELS
from .run import Run
from .text import aligned


def time_table(run: Run) -> str:
    """Images per second of the whole training loop, and what the loss takes of it."""
    columns = {"images_per_second": "images/s", "loss_ms": "loss ms/step", "loss_share": "share of time"}
    outcomes = [{"loss": loss, **vars(r.outcome)} for loss, group in run.by_loss.items() for r in group]
    medians = pd.DataFrame(outcomes).groupby("loss", sort=False)[list(columns)].median()
    rows = [[LABELS[loss], f"{rate:.0f}", f"{ms:.3f}", f"{part:.1%}"] for loss, rate, ms, part in medians.itertuples()]
    text = aligned([["Loss", *columns.values()], *rows])
    title = "Time. Whole training loop, and loss forward + backward per step (medians)"
    return f"{title}\n{text}{_fused_against_eager(medians)}"


def _fused_against_eager(medians: pd.DataFrame) -> str:
    if not {"lmf", "lmf-eager"} <= set(medians.index):
        return ""
    fused, eager = medians.loc["lmf"], medians.loc["lmf-eager"]
    return (
        f"\nLMF fused against eager: loss {fused.loss_ms:.3f} against {eager.loss_ms:.3f} ms a step "
        f"({eager.loss_ms / fused.loss_ms:.1f}x), whole loop {fused.images_per_second:.0f} against "
        f"{eager.images_per_second:.0f} images/s ({fused.images_per_second / eager.images_per_second:.2f}x).\n"
        "Both are the same loss: they differ in rounding alone, which grows over the epochs. Differences between\n"
        "other losses that are not larger than that mean nothing."
    )
