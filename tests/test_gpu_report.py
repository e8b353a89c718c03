"""The GPU report, every part of it, on the CPU: torch.cuda is stubs, Triton's launches go to the emulator."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import gpu_stubs
import pytest
import torch

pytest.importorskip("triton")
from checks import INTERPRETED

if INTERPRETED:
    pytest.skip("needs Triton's compiler, which the interpreter replaces", allow_module_level=True)

import gpu_cases
import gpu_checks
import gpu_compile
import gpu_launches
import gpu_parts
import gpu_report
import gpu_rows
import gpu_sanitized
import gpu_step
import gpu_summary
import gpu_times
from gpu_cases import QUICK, Case, Run
from gpu_rows import Budget, Rows

from lmf_kernels import _backends

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MACHINE = "a stub; torch 0"


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(gpu_times, "liger", lambda: None)
    with gpu_stubs.cuda_stubs():
        yield


@pytest.fixture
def emulated(cuda):
    with gpu_stubs.triton_on_cpu() as launches:
        yield launches


@pytest.fixture
def cpu_kernels(cuda, monkeypatch):
    """The native kernels in the place of Triton's, which would take minutes in the emulator, and each run once."""

    def bench(self, run, prepare=None):
        run(*(() if prepare is None else (prepare(),)))
        return 50.0

    if "native" not in _backends.available_backends(CPU):
        pytest.skip("needs the native extension")
    lmf = gpu_cases.lmf
    monkeypatch.setattr(gpu_cases, "lmf", lambda C, at, backend: lmf(C, at, backend.replace("triton", "native")))
    monkeypatch.setattr(gpu_cases.Bench, "__call__", bench)


def part(name, folder, seconds=600.0):
    arguments = [name, "--out", str(folder), "--machine", MACHINE, "--seconds", str(seconds), "--quick"]
    status = gpu_parts.main(arguments, device="cpu")
    return status, gpu_rows.read(folder / f"{name}.csv")


def one_part(name, folder):
    """What a part is given when it is called here."""
    return Run(gpu_parts.rows_of(name, folder, MACHINE), CPU, QUICK)


def errors(rows):
    return {tuple(row.values()): row["error"] for row in rows if row["error"]}


# ---- times ----------------------------------------------------------------------------------------------------------
def bytes_by_hand(logits, dtype):
    """Logits read twice and a gradient written; labels read twice; five float32 statistics written and read."""
    shape = [int(n) for n in logits[1 : logits.index(")")].split(",")]
    elements = math.prod(shape)
    rows = elements / shape[1]
    itemsize = 4 if dtype == "float32" else 2
    return {
        "forward": elements * itemsize + rows * 28,
        "backward": 2 * elements * itemsize + rows * 28,
        "both": 3 * elements * itemsize + rows * 56,
    }


def test_times_of_every_case(cpu_kernels, tmp_path):
    status, rows = part("times", tmp_path)
    assert status == 0 and not errors(rows)
    regimes = {"few", "middle", "large", "large, split rows", "dense"}
    assert {row["regime"] for row in rows} == regimes == {case.regime for case in gpu_cases.one_of_each_regime(QUICK)}
    cases = {(row["logits"], row["dtype"]) for row in rows}
    assert len(cases) == 3 * len(gpu_cases.cases(gpu_cases.FULL))
    for case in cases:
        of_case = {(row["loss"], row["pass"]): row for row in rows if (row["logits"], row["dtype"]) == case}
        expected = bytes_by_hand(*case)
        for loss in ("copy", "lmf triton", "cross_entropy", "lmf eager"):
            for which, size in expected.items():
                row = of_case[loss, which]
                assert float(row["ms"]) == 50 and float(row["bytes"]) == size
                assert float(row["GB/s"]) == pytest.approx(size / 50e-3 / 1e9, rel=1e-5)
        assert 0 <= float(of_case["lmf triton", "gradient"]["error of the gradient"]) < 4e-3
    assert any("channels_last" in case for case, _ in cases)


def test_full_sizes_fit_a_card_and_its_kernels():
    """Without memory: what each regime is measured at is beyond the caches, and rows are split where they should be."""
    for case in gpu_cases.cases(gpu_cases.FULL):
        assert 2**25 - 2**20 < math.prod(case.shape) < 2**27 + 2**22, case
    assert gpu_cases.FULL.split_rows <= 2 * 132


def test_a_copy_moves_the_bytes_that_are_counted(cpu_kernels, tmp_path, monkeypatch):
    run, copied = one_part("times", tmp_path), []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copied.append(self.nbytes + other.nbytes))
    assert gpu_times._copied(run, 4096)["bytes"] == 4096
    assert set(copied) == {4096}


def test_a_wrong_gradient_is_an_error(cpu_kernels):
    logits, target = gpu_cases.problem(Case("few", (64, 8)), torch.float32, CPU)
    fused = gpu_cases.lmf(8, CPU, "triton")

    def wrong(z, y):
        return fused(z, y) * 1.001

    wrong.margins = fused.margins
    assert gpu_cases.check(fused, logits, target) < 2e-5
    with pytest.raises(AssertionError, match="relative error 1"):
        gpu_cases.check(wrong, logits, target)


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(gpu_times, "cases", lambda sizes: [Case("few", (40, 7))])
    monkeypatch.setattr(gpu_times, "DTYPES", (torch.float32,))


def test_timed_on_the_emulator(emulated, tmp_path, one_case, monkeypatch):
    monkeypatch.setattr(gpu_stubs, "MILLISECONDS", 50.0)
    monkeypatch.setattr(gpu_times, "PASSES", ("both",))
    status, rows = part("times", tmp_path)
    assert status == 0 and not errors(rows) and len(rows) == 5
    assert {launch.name for launch in emulated} == {"forward_kernel", "backward_kernel"}


def test_a_run_that_was_cut_off_goes_on(cpu_kernels, one_case, tmp_path, monkeypatch, capsys):
    """Also one that was cut off in the middle of a line."""
    left = iter([1.0] * 6)  # once before the case, then for each row
    monkeypatch.setattr(Budget, "left", lambda self: next(left, 0.0))
    status, rows = part("times", tmp_path)
    assert status == 0 and len(rows) == 5
    assert "no time left for 8 rows" in capsys.readouterr().out
    assert len((tmp_path / "times.left_out").read_text().splitlines()) == 8
    monkeypatch.undo()
    with open(tmp_path / "times.csv", "a") as file:
        file.write("few,half a li")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_times, "cases", lambda sizes: [Case("few", (40, 7))])
        patch.setattr(gpu_times, "DTYPES", (torch.float32,))
        patch.setattr(
            gpu_times, "losses", lambda C, device: gpu_cases.losses(C, device, "native") | {"lmf triton": None}
        )
        timed = []
        patch.setattr(gpu_times, "time", lambda bench, which, loss, *rest: timed.append(which) or 1.0)
        patch.setattr(gpu_times, "check", lambda *_: 0.0)
        status, again = part("times", tmp_path)
    assert again[:5] == rows and not (tmp_path / "times.left_out").exists()
    done = {(row["loss"], row["pass"]) for row in rows}
    assert all((row["loss"], row["pass"]) not in done for row in again[5:])


def test_an_exception_is_the_result_of_its_row(cpu_kernels, one_case, tmp_path, monkeypatch):
    real = gpu_times.time

    def time(bench, which, loss, *rest):
        if which == "backward" and loss is torch.nn.functional.cross_entropy:
            raise torch.OutOfMemoryError("no memory\nfor that")
        return real(bench, which, loss, *rest)

    monkeypatch.setattr(gpu_times, "time", time)
    status, rows = part("times", tmp_path)
    assert status == 0 and len(rows) == 13
    assert [row["error"] for row in rows if row["error"]] == ["OutOfMemoryError: no memory for that"]
    text = gpu_summary.markdown({"times": rows}, MACHINE, {})
    assert "no memory for that" in text and "| (40, 7) | float32 |" in text and MACHINE in text


def test_after_an_error_that_stays_another_process_goes_on(cpu_kernels, one_case, tmp_path, monkeypatch):
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")

    def raises(*_):
        raise lost

    monkeypatch.setattr(gpu_times, "_copied", raises)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: raises() if (tmp_path / "times.csv").exists() else None)
    monkeypatch.setattr(gpu_times, "check", lambda *_: (tmp_path / "times.csv").exists() and 0.0)
    status, rows = part("times", tmp_path)
    assert status == gpu_parts.RESTART
    assert "illegal memory access" in rows[-1]["error"] and rows[-1]["loss"] == "copy" and len(rows) == 2
    assert not (tmp_path / "times.running").exists()


def test_liger_is_timed_where_it_is_installed(cpu_kernels, one_case, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_times, "liger", lambda: torch.nn.functional.cross_entropy)
    _, rows = part("times", tmp_path)
    assert [row["pass"] for row in rows if row["loss"] == "liger cross_entropy"] == ["both"]
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.cross_entropy", None)
    assert gpu_cases.liger() is None


def test_compiled_and_native(cpu_kernels, tmp_path, monkeypatch, capsys):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", gpu_stubs.signed(lambda model, dynamic: model, torch.compile))
    monkeypatch.setattr(gpu_times, "DTYPES", (torch.float32,))
    status, rows = part("compiled", tmp_path)
    assert status == 0 and not errors(rows)
    assert len(rows) == 3 * 5 and {row["loss"] for row in rows} == {"lmf compiled"} and len(resets) == 6
    if "native" not in _backends.available_backends(torch.device("cuda")):
        assert part("native", tmp_path) == (0, [])
        assert "the extension has no CUDA kernels" in capsys.readouterr().out
    monkeypatch.setattr(_backends, "available_backends", lambda device: ("triton", "native", "reference"))
    status, rows = part("native", tmp_path)
    assert status == 0 and not errors(rows) and len(rows) == 4 * len(gpu_cases.cases(QUICK))
    assert {row["loss"] for row in rows} == {"lmf native"}


# ---- small batches, streams, a step ---------------------------------------------------------------------------------
@pytest.fixture
def few_calls(monkeypatch):
    monkeypatch.setattr(gpu_launches, "CALLS", 1)
    monkeypatch.setattr(gpu_launches, "PAIRS", 1)
    monkeypatch.setattr(gpu_launches, "ROUNDS", 1)
    monkeypatch.setattr(gpu_launches, "SMALL", (Case("few", (4, 7)),))
    monkeypatch.setattr(gpu_launches, "OVERLAPPING", (Case("few", (40, 7)),))


def test_small_batches_and_graphs(emulated, few_calls, tmp_path):
    status, rows = part("launches", tmp_path)
    assert status == 0 and not errors(rows)
    assert len(rows) == 2 * 3 * 4
    assert {float(row["value"]) for row in rows if row["what"] == "launches"} == {2.0}
    assert all(float(row["value"]) > 0 for row in rows)


def test_a_graph_that_computes_something_else_is_an_error(emulated, few_calls, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_stubs.Graph, "replay", lambda self: None)  # what was captured is not done again
    run = one_part("launches", tmp_path)
    loss = gpu_cases.losses(7, CPU)["lmf triton"]
    with pytest.raises(AssertionError, match="another loss: 1 of 1"):
        gpu_launches._replayed(run, loss, *gpu_cases.problem(Case("few", (4, 7)), torch.float32, CPU))


def test_two_streams(emulated, few_calls, tmp_path, monkeypatch):
    status, rows = part("streams", tmp_path)
    assert status == 0 and not errors(rows)
    assert [row["what"] for row in rows] == ["eager", "graphs"]
    real = gpu_launches._gradient
    calls = []

    def another(*args):
        calls.append(1)
        loss, gradient = real(*args)
        return loss, gradient + (len(calls) == 4)

    monkeypatch.setattr(gpu_launches, "_gradient", another)
    with pytest.raises(AssertionError, match="another gradient: 280 of 280"):
        gpu_launches._two(one_part("streams", tmp_path), Case("few", (40, 7)), False)


class Tiny(torch.nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, num_classes))


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stub", "real"])
def test_step_of_a_resnet(cpu_kernels, tmp_path, monkeypatch, real):
    models = pytest.importorskip("torchvision.models", reason="needs the package torchvision")
    if not real:
        monkeypatch.setattr(models, "resnet50", gpu_stubs.signed(Tiny, models.resnet50))
    monkeypatch.setattr(gpu_step, "STEPS", 2)
    monkeypatch.setattr(gpu_stubs, "MILLISECONDS", 50.0)
    run = one_part("step", tmp_path)
    gpu_step.step(run, batch=2, side=32)
    rows = gpu_rows.read(run.rows.path)
    losses = ["lmf triton", "cross_entropy", "lmf eager"]
    assert [(row["loss"], row["classes"]) for row in rows] == [(who, n) for n in ("7", "1000") for who in losses]
    assert not errors(rows)
    # Any two events are 50 ms apart: those around both steps, and those around each of their two losses.
    expected = {"ms a step": 25, "images/s": 2 / 25e-3, "loss ms": 50, "share of the loss": 2}
    assert all(float(row[name]) == value for row in rows for name, value in expected.items())


def test_step_without_torchvision(cuda, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    status, rows = part("step", tmp_path)
    assert status == 0 and len(rows) == 1
    assert "torchvision" in rows[0]["note"] and not rows[0]["error"]


# ---- other programs -------------------------------------------------------------------------------------------------
def program(path, text):
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    return lambda name, text: program(folder / name, text)


SANITIZER = """
import sys
assert sys.argv[1] == "--tool"
tool = sys.argv[2]
options = ["--report-api-errors", "no"] if tool == "memcheck" else []
assert sys.argv[3:] == [*options, "small cases"], sys.argv
print("========= COMPUTE-SANITIZER")
print("case: few")
if tool == "racecheck" and RACY:
    print("========= Error: Race reported between Write access at forward_kernel+0x10")
print("case: dense")
print("========= " + ("ERROR SUMMARY: 0 errors" if tool == "memcheck" else
      "RACECHECK SUMMARY: %d hazards displayed (%d errors, 0 warnings)" % (RACY, RACY)))
"""


def test_sanitizer(cuda, on_path, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "SANITIZED", ("small cases",))
    _, rows = part("sanitizer", tmp_path)
    assert [row["outcome"] for row in rows] == ["not run: no compute-sanitizer on PATH"]
    for racy, folder in enumerate((tmp_path / "clean", tmp_path / "racy")):
        on_path("compute-sanitizer", SANITIZER.replace("RACY", str(racy)))
        status, rows = part("sanitizer", folder)
        assert status == 0
        assert [(row["tool"], row["case"]) for row in rows] == [
            (tool, case) for tool in ("memcheck", "racecheck") for case in ("few", "dense", "all")
        ]
        bad = [row["case"] for row in rows if row["error"]]
        assert bad == (["dense", "all"] if racy else [])
    assert "Race reported" in rows[-2]["error"] and "1 hazards" in rows[-1]["error"]


def test_what_the_sanitizer_runs(emulated, monkeypatch, capsys):
    assert {case.regime for case in gpu_sanitized.CASES} == {case.regime for case in gpu_cases.cases(QUICK)}
    monkeypatch.setattr(gpu_sanitized, "CASES", gpu_sanitized.CASES[-1:])
    monkeypatch.setattr(_backends, "available_backends", lambda device: ("triton", "reference"))
    gpu_sanitized.main(CPU)
    assert capsys.readouterr().out == "case: triton, dense, (2, 5, 9, 7) bfloat16\n"


def test_build(cuda, on_path, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "BUILDER", (str(on_path("builder", "print('built')")),))
    _, rows = part("build", tmp_path / "no nvcc")
    assert [row["outcome"] for row in rows] == ["native kernels not built: no nvcc on PATH"] and not errors(rows)
    on_path("nvcc", "")
    _, rows = part("build", tmp_path / "nvcc")
    assert rows[0]["outcome"] == "built" and float(rows[0]["seconds"]) > 0
    on_path("builder", "raise SystemExit('no module')")
    _, rows = part("build", tmp_path / "fails")
    assert "no module exit status: 1" in rows[0]["error"]


def test_compile_ahead(cuda, tmp_path, monkeypatch):
    script = "import sys; print('3 problems') if sys.argv[1] != '1/3' else sys.exit('no compiler')"
    monkeypatch.setattr(gpu_checks, "workers", lambda: 3)
    monkeypatch.setattr(gpu_checks, "COMPILER", (sys.executable, "-c", script))
    _, rows = part("compile", tmp_path)
    assert [row["kernels of"] or row["error"] for row in rows] == ["3 problems", "no compiler", "3 problems"]


def test_what_compiles_ahead(cpu_kernels, monkeypatch):
    every = len(gpu_cases.cases(QUICK)) + len(gpu_compile.SMALL) + len(gpu_compile.OVERLAPPING)
    monkeypatch.setattr(gpu_compile, "DTYPES", gpu_compile.DTYPES[:1])
    monkeypatch.setattr(gpu_compile, "lmf", gpu_cases.lmf)
    assert sum(gpu_compile.main(f"{i}/5", CPU, QUICK) for i in range(5)) == every


STUBBED_PYTEST = (sys.executable, "-m", "pytest", "-p", "gpu_stubs")
IN_MAKE_TEST = "bad_labels or host_waits or graph_sees"


@pytest.fixture
def tests_on_stubs(cuda, monkeypatch):
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setattr(gpu_checks, "workers", lambda: 2)


@pytest.mark.parametrize("chosen", [IN_MAKE_TEST, pytest.param("triton", marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_tests_for_a_gpu(tests_on_stubs, tmp_path, monkeypatch, chosen):
    monkeypatch.setattr(gpu_checks, "PYTEST", (*STUBBED_PYTEST, "-k", chosen))
    monkeypatch.setattr(gpu_checks, "workers", lambda: 1 if chosen == IN_MAKE_TEST else 2)
    status, rows = part("tests", tmp_path)
    log = tmp_path / "tests.log"
    assert status == 0 and not errors(rows), log.read_text()
    assert len(rows) >= 3 and {row["outcome"] for row in rows} == {"passed"}
    _, again = part("tests", tmp_path)
    assert again == rows


def test_a_test_that_fails(tests_on_stubs, tmp_path, monkeypatch, capsys):
    script = """
import os, sys
if "--collect-only" in sys.argv:
    print("tests/test_gpu.py::a[triton]\\ntests/test_gpu.py::b[triton]\\ntests/test_gpu.py::c[native]\\n3 tests")
elif "tests/test_gpu.py::a[triton]" in sys.argv:
    print("tests/test_gpu.py::a[triton] FAILED   [ 50%]\\nassert 1 == 2")
    sys.exit(1)
else:
    os.abort()
"""
    monkeypatch.setattr(gpu_checks, "PYTEST", (sys.executable, "-c", script))
    _, rows = part("tests", tmp_path)
    found = {row["test"]: row["error"] for row in rows}
    assert found == {
        "test_gpu.py::a[triton]": "see tests.log",
        "test_gpu.py::b[triton]": "not run: pytest ended with exit status: -6",
    }
    assert "assert 1 == 2" in (tmp_path / "tests.log").read_text()
    _, rows = part("native_tests", tmp_path)
    assert [row["test"] for row in rows] == ["test_gpu.py::c[native]"]


# ---- the command ----------------------------------------------------------------------------------------------------
CHILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, BENCHMARKS)
from gpu_rows import Budget, Rows
name, folder, machine, seconds = sys.argv[1], Path(sys.argv[3]), sys.argv[5], float(sys.argv[7])
rows = Rows(folder, name, KEYS[name][0], KEYS[name][1], machine)
rows.budget = Budget(seconds)
first = KEYS[name][1][0]
def crash(): os.abort()
def hang(): time.sleep(60)
for what in ("fine", "crash", "fine too", "hang", "never") if name == "streams" else ("fine",):
    rows.run((what,) * len(rows.keys), {"crash": crash, "hang": hang}.get(what, lambda: {first: 1.0}))
if name == "step" and not (folder / "second").exists():
    (folder / "second").touch()
    sys.exit(RESTART)
rows.close()
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    keys = {name: (tuple(part.keys), tuple(part.values)) for name, part in gpu_parts.PARTS.items()}
    text = f"BENCHMARKS, KEYS, RESTART = {str(gpu_stubs.BENCHMARKS)!r}, {keys!r}, {gpu_parts.RESTART}\n{CHILD}"
    monkeypatch.setattr(gpu_report, "GRACE", 1.0)
    monkeypatch.setattr(gpu_report, "SHORTEST", 0.5)
    return sys.executable, str(program(tmp_path / "child.py", text))


def test_crashes_and_hangs_end_no_more_than_their_rows(child, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(gpu_parts.PARTS, "streams", gpu_parts.PARTS["streams"]._replace(seconds=4.0))
    out = tmp_path / "out"
    assert gpu_report.measure(["streams", "step"], out, MACHINE, 60, [], child) == 1
    found = {row["logits"]: row["error"] for row in gpu_rows.read(out / "streams.csv")}
    assert found == {
        "fine": "", "crash": "the process ended with status -6", "fine too": "", "hang": "stopped after 4 s",
    }  # fmt: skip
    assert len(gpu_rows.read(out / "step.csv")) == 1 and (out / "second").exists()
    text = (out / "report.md").read_text()
    assert MACHINE in text and "the process ended with status -6" in text and "not there after 4 s" in text
    assert "there were errors" in capfd.readouterr().out
    assert gpu_report.measure(["step"], out, MACHINE, 60, [], child) == 0


def test_the_command(cuda, child, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_report.measure, "__defaults__", (child,))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.csv").touch()

    def command(*options):
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--measure-only", "--out", str(tmp_path / "out"), *options])
        return gpu_report.main()

    assert command("--parts", "launches", "--budget", "60") == 0 and (tmp_path / "out/old.csv").exists()
    (row,) = gpu_rows.read(tmp_path / "out/launches.csv")
    assert row["machine"].startswith(f"a stub; torch {torch.__version__}, Triton 3.")
    assert command("--parts", "launches", "--fresh") == 0 and not (tmp_path / "out/old.csv").exists()
    with pytest.raises(SystemExit):
        command("--parts", "launches,lunch")
    assert "lunch unknown, expected some of: tests, compile, times" in capsys.readouterr().err


def test_parts_for_which_there_is_no_time(child, tmp_path, capfd):
    assert gpu_report.measure(["step"], tmp_path / "out", MACHINE, 1.2, [], child) == 0
    assert not (tmp_path / "out/step.csv").exists()
    assert "step: left out, no time for it" in capfd.readouterr().out
    assert "all that is not there yet" in (tmp_path / "out/report.md").read_text()


def test_rows_of_another_card_are_kept_apart(tmp_path):
    for machine in ("one", "other"):
        rows = Rows(tmp_path, "x", ("a",), ("b",), machine)
        rows.run((1,), lambda machine=machine: {"b": machine})
    assert [row["b"] for row in gpu_rows.read(tmp_path / "x.csv")] == ["one", "other"]


def test_tables_and_plot(tmp_path):
    rows = Rows(tmp_path, "times", *gpu_times.FIELDS, MACHINE)
    for loss, speed in (("copy", 3000.0), ("lmf triton", 2400.0), ("cross_entropy", 600.0)):
        for which in ("forward", "backward", "both"):
            rows.add(("few", "(9, 8)", "float32", loss, which), {"ms": 600 / speed, "bytes": 1, "GB/s": speed})
    rows.add(("few", "(9, 8)", "float32", "lmf triton", "gradient"), {"error of the gradient": 3e-7})
    gpu_summary.write(tmp_path, ["times", "step"], MACHINE)
    text = (tmp_path / "report.md").read_text()
    assert "| (9, 8) | float32 | 2400 (80%) | 2400 (80%) | 2400 (80%) | 3000 | 3.0e-07 |" in text
    assert "| (9, 8) | float32 | 0.250/0.250/0.250 | -/-/- | 1.000/1.000/1.000 |" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_make_gpu_without_a_gpu():
    # A make around this test hands its own variables on.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "ARGS")}
    command = ["make", "gpu", f"PYTHON={sys.executable}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "No GPU here: nothing to measure." in run.stdout, run.stdout + run.stderr


def test_measuring_imports_no_emulator():
    code = "import sys, gpu_report, gpu_parts, gpu_summary; print([m for m in sys.modules if m in sys.argv[1:]])"
    unwanted = ["gpu_offline", "gpu_tables", "ptxsim", "triton.compiler", "matplotlib", "torchvision", "mpmath.libmp"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{gpu_stubs.BENCHMARKS}"}
    run = subprocess.run([sys.executable, "-c", code, *unwanted[:3]], env=environment, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stdout + run.stderr
