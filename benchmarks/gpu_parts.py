"""The parts of the GPU report, in the order in which they run, and the process that runs one of them.

python gpu_parts.py PART --out FOLDER --machine NAME --seconds S [--quick]
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gpu_checks
import gpu_launches
import gpu_step
import gpu_times
import torch
from gpu_cases import FULL, QUICK, Run
from gpu_rows import Budget, Restart, Rows

RESTART = 75  # exit status of a process whose device answers no more


class Part(NamedTuple):
    seconds: float  # after which it begins no new row
    what: str
    keys: Sequence[str]
    values: Sequence[str]
    run: Callable[[Run], None]


PARTS = {
    "tests": Part(100, "tests/test_gpu.py on the Triton kernels", *gpu_checks.TEST, gpu_checks.tests),
    "compile": Part(60, "compilation of the kernels to be timed", *gpu_checks.COMPILE, gpu_checks.compile_ahead),
    "times": Part(120, "forward and backward beside a copy and other losses", *gpu_times.FIELDS, gpu_times.times),
    "launches": Part(30, "small batches: launches, host, graphs", *gpu_launches.LAUNCHES, gpu_launches.launches),
    "streams": Part(20, "two streams, two graphs", *gpu_launches.STREAMS, gpu_launches.streams),
    "step": Part(40, "a training step of ResNet-50", *gpu_step.FIELDS, gpu_step.step),
    "sanitizer": Part(80, "compute-sanitizer", *gpu_checks.SANITIZER, gpu_checks.sanitizer),
    "build": Part(90, "the native extension", *gpu_checks.BUILD, gpu_checks.build),
    "native_tests": Part(
        40, "tests/test_gpu.py on the native kernels", *gpu_checks.TEST, partial(gpu_checks.tests, backend="native")
    ),
    "native": Part(40, "the native kernels' times", *gpu_times.FIELDS, gpu_times.native),
    # The last one: each of its rows takes seconds, and stands for itself.
    "compiled": Part(120, "torch.compile of the eager loss", *gpu_times.FIELDS, gpu_times.compiled),
}


def rows_of(name: str, folder: Path, machine: str) -> Rows:
    return Rows(folder, name, PARTS[name].keys, PARTS[name].values, machine)


def run(name: str, folder: Path, machine: str, seconds: float, quick: bool, device: torch.device) -> int:
    """Runs a part here; the exit status of its process."""
    rows = rows_of(name, folder, machine)
    rows.budget = Budget(seconds)
    rows.still_answers = torch.cuda.synchronize
    try:
        PARTS[name].run(Run(rows, device, QUICK if quick else FULL))
    except Restart:
        print(f"{name}: the device answers no more; the rest goes on in a new process", flush=True)
        return RESTART
    rows.close()
    return 0


def main(arguments: Sequence[str] | None = None, device: str = "cuda") -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    return run(given.part, given.out, given.machine, given.seconds, given.quick, torch.device(device))


if __name__ == "__main__":
    sys.exit(main())
