"""The tables of docs/gpu.md, which need no GPU: compiled resources, emulated traffic and host time."""

from collections.abc import Sequence

import torch
from gpu_cases import liger, name
from gpu_offline import (
    CASES,
    DTYPES,
    TARGETS,
    Case,
    Resources,
    Traffic,
    Whole,
    host_times,
    kernels,
    resources,
    traffic,
    whole,
)
from gpu_rows import table

from lmf_kernels import lmf_loss

STEPS = ("forward", "backward")
LIGER_SHAPE = (32, 32000)  # of (4096, 32000): what the emulator can run


def resource_row(case: Case, dtype: torch.dtype, found: dict[tuple[str, str], Resources]) -> tuple[object, ...]:
    """Registers of (step, target), and what was spilled if anything was."""

    def cell(one: Resources) -> str:
        spills = f", {one.spilled} B spilled" if one.spilled else ""
        return f"{one.registers}" + spills + (f", {one.local} B local" if one.local else "")

    targets = dict.fromkeys(target for _, target in found)
    return (
        case.regime,
        case,
        name(dtype),
        *(" / ".join(cell(found[step, target]) for step in STEPS) for target in targets),
    )


def resource_table(cases: Sequence[Case], dtypes: Sequence[torch.dtype], targets: Sequence[str]) -> str:
    rows = []
    for case in cases:
        for dtype in dtypes:
            found = {
                (step, target): resources(kernel, target)
                for step, kernel in kernels(case, dtype).items()
                for target in targets
            }
            rows.append(resource_row(case, dtype, found))
    return table(("regime", "logits", "dtype", *targets), rows)


TRAFFIC = (
    "logits", "dtype", "load", "read / read + written", "sectors", "other B a row", "ex2 an element",
    "other MUFU a row", "instructions", "shared a row",
)  # fmt: skip


def traffic_row(case: Case, dtype: torch.dtype, found: dict[str, Traffic]) -> tuple[object, ...]:
    ahead, back = (found[step] for step in STEPS)
    return (
        case, name(dtype), f"{ahead.width} B",
        f"{ahead.read:.3f} / {back.read:.3f} + {back.written:.3f}",
        f"{ahead.read_sectors:.2f} / {back.read_sectors:.2f} + {back.written_sectors:.2f}",
        pair(ahead, back, "row_bytes"), pair(ahead, back, "exponentials", 2), pair(ahead, back, "mufu_a_row"),
        pair(ahead, back, "instructions"), pair(ahead, back, "shared_wavefronts"),
    )  # fmt: skip


def traffic_table(cases: Sequence[Case], dtypes: Sequence[torch.dtype]) -> str:
    rows = (traffic_row(case, dtype, traffic(case, dtype)) for case in cases for dtype in dtypes)
    return table(TRAFFIC, rows)


def pair(ahead: Traffic, back: Traffic, field: str, digits: int = 1) -> str:
    return " / ".join(f"{getattr(found, field):.{digits}f}" for found in (ahead, back))


def peers(shape: tuple[int, ...] = LIGER_SHAPE) -> dict[str, Whole]:
    """Forward and backward in bfloat16: the LMF loss with margins and weights, and Liger's cross-entropy."""
    vector = torch.rand(shape[1])
    found = {
        "lmf_kernels, LMF loss": whole(
            lambda logits, target: lmf_loss(logits, target, margins=vector, weight=vector, backend="triton"),
            shape,
            torch.bfloat16,
        )
    }
    other = liger()
    if other is not None:
        found["Liger, cross-entropy"] = whole(other, shape, torch.bfloat16)
    return found


def peer_table(found: dict[str, Whole]) -> str:
    rows = (
        (
            who,
            f"{one.moved:.3f}",
            f"{one.row_bytes:.0f}",
            f"{one.bytes:.0f}",
            one.launches,
            len(one.operations),
            " ".join(one.operations) or "-",
        )
        for who, one in found.items()
    )
    header = (
        "",
        "logits + gradient moved",
        "other B a row",
        "bytes in all",
        "Triton launches",
        "other operations",
        "which",
    )
    return table(header, rows)


def host_table(times: dict[str, float]) -> str:
    return table(("host work", "us"), ((what, f"{us:.1f}") for what, us in times.items()))


def show(quick: bool) -> None:
    """Prints them all; with `quick` a few cases of each."""
    cases = CASES[1:3] if quick else CASES
    dtypes = DTYPES[:1] if quick else DTYPES
    targets = ("sm_90",) if quick else tuple(TARGETS)
    print("Registers of a thread, forward / backward; spilled and local bytes only where there are any\n")
    print(resource_table(cases, dtypes, targets))
    print("\nCounts of the compiled code in the emulator, forward / backward\n")
    print(traffic_table(cases, dtypes[:2]))
    shape = (2, 32000) if quick else LIGER_SHAPE
    print(f"\nForward and backward together, {shape} bfloat16\n")
    print(peer_table(peers(shape)))
    print("\nHost time down to the driver's launch call, with (64, 7) logits\n")
    print(host_table(host_times(10 if quick else 200)))
