"""A small forward and backward in each regime, for compute-sanitizer: prints `case: NAME` when the device is done."""

import torch
from gpu_cases import DTYPES, Case, lmf, name, problem

from lmf_kernels import _backends

CASES = (
    Case("few", (300, 7)),
    Case("few", (300, 8)),
    Case("middle", (37, 1000)),
    Case("large", (300, 20000)),
    Case("large, split rows", (3, 40000)),
    Case("dense", (2, 21, 9, 8)),
    Case("dense", (2, 5, 9, 7)),
)


def main(device: torch.device) -> None:
    for backend in _backends.available_backends(device)[:-1]:  # all but the reference
        for case in CASES:
            logits, target = problem(case, torch.float32 if case.regime != "dense" else DTYPES[0], device)
            loss = lmf(case.shape[1], device, backend)(logits, target)
            loss.backward()
            torch.cuda.synchronize()
            assert loss.isfinite().item() and logits.grad is not None and logits.grad.isfinite().all().item()
            print(f"case: {backend}, {case.regime}, {case} {name(logits.dtype)}", flush=True)


if __name__ == "__main__":
    main(torch.device("cuda", torch.cuda.current_device()))
