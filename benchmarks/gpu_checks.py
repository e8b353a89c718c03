"""The parts of the GPU report that are other programs: tests, compilations ahead, the native build, the sanitizer."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from gpu_cases import Run
from gpu_rows import Rows

ROOT = Path(__file__).resolve().parents[1]
TEST = ("test",), ("outcome",)
COMPILE = ("share",), ("kernels of",)
BUILD = ("what",), ("seconds", "outcome")
SANITIZER = ("tool", "case"), ("outcome",)
# And their options. What torch asks of the driver to see whether it can is no error of ours.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
HERE = Path(__file__).parent
PYTEST = (sys.executable, "-m", "pytest")
COMPILER = (sys.executable, str(HERE / "gpu_compile.py"))
BUILDER = (sys.executable, "-m", "lmf_kernels", "build")
SANITIZED = (sys.executable, str(HERE / "gpu_sanitized.py"))
OUTCOME = re.compile(r"^(?:tests/)?(test_gpu\.py::\S+) (PASSED|FAILED|ERROR|SKIPPED)\b")


def workers() -> int:
    """Processes that compile Triton kernels at a time."""
    return max(1, min(10, (os.cpu_count() or 1) - 2))


def lines_of(command: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[str]:
    """What the command prints, line by line; at its end its exit status, as `exit status: N`."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rstrip("\n")
        yield f"exit status: {process.wait()}"


# ---- tests ----------------------------------------------------------------------------------------------------------
def tests(run: Run, backend: str = "triton") -> None:
    """tests/test_gpu.py, by several processes, as each kernel has to be compiled; a row for each test."""
    rows, pytest = run.rows, (*PYTEST, "-p", "no:cacheprovider", "--color=no")
    listed = list(lines_of([*pytest, "--collect-only", "-q", "tests/test_gpu.py"]))
    found = [line.removeprefix("tests/") for line in listed if "test_gpu.py::" in line]
    found = [test for test in found if backend in test]
    if not found:
        print(f"{rows.part}: no tests of the backend {backend} here: {listed[-2:]}", flush=True)
        return
    missing = [key[0] for key in rows.missing((test,) for test in found)]
    shares = [share for share in (missing[i :: workers()] for i in range(workers())) if share]
    lock, failures = threading.Lock(), []

    def share_of(share: list[str]) -> None:
        command = [*pytest, "-v", "--tb=short", *(f"tests/{test}" for test in share)]
        output = []
        for line in lines_of(command):
            output.append(line)
            match = OUTCOME.match(line)
            if match:
                bad = match[2] in ("FAILED", "ERROR")
                with lock:
                    rows.add((match[1],), {"outcome": match[2].lower(), "error": "see tests.log" if bad else ""})
        with lock:
            if output[-1] != "exit status: 0":
                failures.append("\n".join(output))
            for test in share:
                if (test,) not in rows.found:
                    rows.add((test,), {"error": f"not run: pytest ended with {output[-1]}"})

    threads = [threading.Thread(target=share_of, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        with open(rows.path.with_suffix(".log"), "a") as file:
            file.write("\n".join(failures) + "\n")
        print("\n".join(failures), flush=True)


# ---- compilations ahead ---------------------------------------------------------------------------------------------
def compile_ahead(run: Run) -> None:
    """Fills Triton's cache with the kernels that will be timed, by several processes: one takes a second a kernel."""
    rows, shares = run.rows, workers()
    keys = [key[0] for key in rows.missing((f"{i}/{shares}",) for i in range(shares))]
    processes = {
        key: subprocess.Popen([*COMPILER, key], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for key in keys
    }
    for key, process in processes.items():
        output = process.communicate()[0].strip().splitlines() or [""]
        done = {"kernels of": output[-1]} if process.returncode == 0 else {"error": output[-1]}
        rows.add((key,), done)


# ---- the native extension -------------------------------------------------------------------------------------------
def build(run: Run) -> None:
    """The CUDA kernels of the extension, in place, for the GPU that is there."""

    def measure() -> dict[str, object]:
        if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
            return {"outcome": "native kernels not built: no nvcc on PATH"}
        start, output = time.monotonic(), []
        for line in lines_of(BUILDER):
            output.append(line)
            print(f"    {line}", flush=True)
        if output[-1] != "exit status: 0":
            raise RuntimeError("native kernels not built: " + " ".join(output[-3:]))
        return {"seconds": time.monotonic() - start, "outcome": "built"}

    run.rows.run(("native extension",), measure)


# ---- compute-sanitizer ----------------------------------------------------------------------------------------------
def sanitizer(run: Run) -> None:
    """memcheck and racecheck, each over a case of each regime in one process: a start takes longer than the cases."""
    rows = run.rows
    program = shutil.which("compute-sanitizer")
    if program is None:
        rows.run(("-", "-"), lambda: {"outcome": "not run: no compute-sanitizer on PATH"})
        return
    for tool in TOOLS:
        if (tool, "all") not in rows.found:
            command = [program, "--tool", tool, *TOOLS[tool], *SANITIZED]
            rows.run((tool, "all"), partial(_sanitized, rows, tool, command))


def _sanitized(rows: Rows, tool: str, command: Sequence[str]) -> dict[str, object]:
    complaints: list[str] = []
    summary = status = ""
    for line in lines_of(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}):  # so that tensors end where memory does
        if line.startswith("exit status: "):
            status = line
        elif line.startswith("case: "):
            case = line.removeprefix("case: ")
            if (tool, case) not in rows.found:
                rows.add((tool, case), {"error": complaints[0]} if complaints else {"outcome": "clean"})
            complaints = []
        elif "SUMMARY" in line:
            summary = line.strip("= ")
        elif re.search(r"Invalid|Error|Race|hazard|Misaligned|out of bounds", line, re.IGNORECASE):
            complaints.append(line.strip("= "))
            print(f"    {line}", flush=True)
    clean = status == "exit status: 0" and re.search(r"\b0 (errors|hazards)", summary)
    if not clean or complaints:
        raise RuntimeError("; ".join([*complaints[:2], summary, status]))
    return {"outcome": summary}
