"""Compiles a share of the Triton kernels that the report times: python gpu_compile.py INDEX/NUMBER."""

import sys

import torch
from gpu_cases import DTYPES, FULL, Sizes, cases, lmf, problem
from gpu_launches import OVERLAPPING, SMALL


def main(share: str, device: torch.device, sizes: Sizes) -> int:
    """How many problems that was. They are launched, since Triton decides at a launch what it compiles."""
    index, number = map(int, share.split("/"))
    every = [(case, dtype) for case in (*cases(sizes), *SMALL, *OVERLAPPING) for dtype in DTYPES]
    mine = every[index::number]
    for case, dtype in mine:
        logits, target = problem(case, dtype, device)
        lmf(case.shape[1], device, "triton")(logits, target).backward()
        del logits, target
        torch.cuda.empty_cache()  # for the other processes
    torch.cuda.synchronize()
    return len(mine)


if __name__ == "__main__":
    print(f"{main(sys.argv[1], torch.device('cuda', torch.cuda.current_device()), FULL)} problems")
