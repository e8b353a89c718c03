"""What the kernels do on a GPU, measured; and without one, what can be known of the Triton kernels.

    python benchmarks/gpu_report.py [--out results/gpu] [--quick] [--measure-only] [--parts A,B] [--budget S] [--fresh]

Prints the tables of docs/gpu.md, which need no GPU and take minutes (not with --measure-only). Where a GPU is found,
the parts of gpu_parts.py follow, each in a process of its own, so that a crash or a hang ends no more than its row.
Rows are written to CSV files of the folder as they come; report.md and report.png are made anew after each part. A run
that was cut off goes on where it was: rows that are there are not measured again, unless --fresh is given. The exit
status is 1 if a row has an error.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_rows import Budget

GRACE = 30  # seconds that a part has to end its last row
SHORTEST = 5  # seconds for which it is worth the start of a process
STARTS = 5  # of the processes of one part
CHILD = (sys.executable, str(Path(__file__).with_name("gpu_parts.py")))


def run_part(
    name: str, folder: Path, machine: str, budget: Budget, options: Sequence[str], child: Sequence[str]
) -> bool:
    """Runs a part in processes of its own until one reaches the end; whether it came to an end."""
    from gpu_parts import PARTS, RESTART, rows_of

    part = PARTS[name]
    seconds = min(part.seconds, budget.left() - GRACE)
    if seconds < SHORTEST:
        (folder / f"{name}.left_out").write_text("all that is not there yet\n")
        print(f"\n{name}: left out, no time for it", flush=True)
        return True
    print(f"\n{name}: {part.what}, {seconds:.0f} s at most", flush=True)
    of_part = Budget(seconds)
    for _ in range(STARTS):
        command = [
            *child,
            name,
            "--out",
            str(folder),
            "--machine",
            machine,
            "--seconds",
            f"{of_part.left():.1f}",
            *options,
        ]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            status = process.wait(max(0.0, of_part.left()) + GRACE)
        except subprocess.TimeoutExpired:
            status = None
        except BaseException:
            _end(process)
            raise
        if status == 0:
            return True
        if status is None:
            _end(process)
            rows_of(name, folder, machine).blame(f"stopped after {seconds:.0f} s")
            (folder / f"{name}.left_out").write_text(f"what was not there after {seconds:.0f} s\n")
            print(f"{name}: stopped after {seconds:.0f} s; the rows that were written are kept", flush=True)
            return True
        rows = rows_of(name, folder, machine)
        if status != RESTART and not rows.running.exists():
            print(f"{name}: ended with status {status}", flush=True)
            return False
        rows.blame(f"the process ended with status {status}")
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and those that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure(
    names: Sequence[str],
    folder: Path,
    machine: str,
    seconds: float,
    options: Sequence[str],
    child: Sequence[str] = CHILD,
) -> int:
    """Runs the parts; 1 if one of them broke off or has a row with an error."""
    import gpu_summary
    from gpu_parts import PARTS, rows_of
    from gpu_rows import one_line

    folder.mkdir(parents=True, exist_ok=True)
    print(f"\nMeasured on {machine}; {seconds:.0f} s at most; results in {folder}", flush=True)
    budget, failed = Budget(seconds), 0
    for name in names:
        failed |= not run_part(name, folder, machine, budget, options, child)
        failed |= any(row["error"] for row in rows_of(name, folder, machine).found.values())
        try:
            gpu_summary.write(folder, list(PARTS), machine)
        except Exception as error:  # the measurements go on
            print(f"no summary: {one_line(error)}", flush=True)
            failed = 1
    print(f"\n{(folder / 'report.md').read_text()}\nSaved in {folder}" + "; there were errors" * failed, flush=True)
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a few cases of each table, small sizes on a GPU")
    parser.add_argument("--measure-only", action="store_true", help="without the tables that need no GPU")
    parser.add_argument("--parts", help="names with commas: those to measure (default: all)")
    parser.add_argument("--budget", type=float, default=460, metavar="S", help="seconds for all parts (default: 460)")
    parser.add_argument("--fresh", action="store_true", help="delete the results of earlier runs first")
    given = parser.parse_args()
    if not given.measure_only:
        import gpu_tables

        gpu_tables.show(given.quick)
    import torch
    from gpu_parts import PARTS

    names = given.parts.split(",") if given.parts else list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} unknown, expected some of: {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("\nNo GPU here: nothing to measure.")
        return int(given.measure_only)
    if given.fresh:
        shutil.rmtree(given.out, ignore_errors=True)
    return measure(names, given.out, machine(), given.budget, ["--quick"] if given.quick else [])


def machine() -> str:
    """The card and the versions, which each row carries."""
    import torch

    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "missing"
    return f"{torch.cuda.get_device_name()}; torch {torch.__version__}, Triton {triton}"


if __name__ == "__main__":
    sys.exit(main())
