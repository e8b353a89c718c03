"""Small batches on a GPU, where the host counts: launches, host time, graph replay; and launches that overlap."""

import time
from collections.abc import Callable
from functools import partial

import torch
from gpu_cases import Case, Loss, Run, losses, name, problem
from torch import Tensor

SMALL = (Case("few", (32, 8)), Case("few", (512, 7)), Case("middle", (256, 1000)), Case("large", (64, 32000)))
# Forward launches of many programs, and rows split over programs: what counts on a counter.
OVERLAPPING = (Case("few", (65536, 8)), Case("middle", (4096, 1000)), Case("large, split rows", (16, 128256)))
LAUNCHES = ("logits", "dtype", "loss", "what"), ("value",)
STREAMS = ("logits", "what"), ("alone us", "together us")
CALLS = 40  # between synchronisations: fewer launches than a stream's queue holds
PAIRS = 10  # of problems on two streams, likewise
ROUNDS = 20


def launches(run: Run) -> None:
    """Of a forward and a backward together."""
    for case in SMALL:
        for dtype in (torch.float32, torch.bfloat16):
            logits, target = problem(case, dtype, run.device)
            for who, loss in losses(case.shape[1], run.device).items():
                step = partial(_gradient, loss, logits, target)
                counts: dict[str, Callable[[], float]] = {
                    "launches": partial(_launched, step),
                    "host us": partial(_host, run, step),
                    "us, one step after another": partial(_wall, run, step),
                    "us, graph replay": partial(_replayed, run, loss, logits, target),
                }
                for what, count in counts.items():
                    run.rows.run((case, name(dtype), who, what), lambda count=count: {"value": count()})


def _gradient(loss: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    result = loss(logits, target)
    (gradient,) = torch.autograd.grad(result, logits)
    return result.detach(), gradient


def _launched(step: Callable[[], object]) -> float:
    """Kernels, copies and fills of a step, as the profiler sees them; one fill makes grad_output."""
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    found = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not found:
        raise RuntimeError("the profiler saw nothing on the device")
    print("    " + ", ".join(name[:60] for name in found[:4]) + (", ..." if len(found) > 4 else ""), flush=True)
    return len(found)


def _host(run: Run, step: Callable[[], object]) -> float:
    """Microseconds of the host in a step, which does not wait for the device; the best of many short batches."""
    return min(_batch(run, step)[0] for _ in range(ROUNDS))


def _wall(run: Run, step: Callable[[], object]) -> float:
    """Microseconds of a step until the device is done, the best of many short batches."""
    return min(_batch(run, step)[1] for _ in range(ROUNDS))


def _batch(run: Run, step: Callable[[], object]) -> tuple[float, float]:
    torch.cuda.synchronize(run.device)
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    launched = time.perf_counter()
    torch.cuda.synchronize(run.device)
    done = time.perf_counter()
    return 1e6 * (launched - start) / CALLS, 1e6 * (done - start) / CALLS


class Captured:
    """A step in a CUDA graph, with what it computes."""

    def __init__(self, loss: Loss, logits: Tensor, target: Tensor) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                _gradient(loss, logits, target)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss, self.gradient = _gradient(loss, logits, target)


def _same_bits(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for what, a, b in zip(("loss", "gradient"), found, expected, strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"another {what}: {int((a != b).sum())} of {a.numel()} elements differ")


def _replayed(run: Run, loss: Loss, logits: Tensor, target: Tensor) -> float:
    """Microseconds of a replay; before it and with other logits, it has to give an eager step's bits."""
    captured = Captured(loss, logits, target)
    for factor in (1.0, -0.5):
        with torch.no_grad():
            logits.mul_(factor)
        captured.graph.replay()
        _same_bits((captured.loss, captured.gradient), _gradient(loss, logits, target))
    return _wall(run, captured.graph.replay)


# ---- two streams ----------------------------------------------------------------------------------------------------
def streams(run: Run) -> None:
    """Two problems on two streams at a time: the same bits as one after the other, in eager mode and as graphs."""
    for case in OVERLAPPING:
        run.rows.run((case, "eager"), partial(_two, run, case, False))
        run.rows.run((case, "graphs"), partial(_two, run, case, True))


def _two(run: Run, case: Case, graphs: bool) -> dict[str, object]:
    loss = losses(case.shape[1], run.device)["lmf triton"]
    problems = [problem(case, torch.float32, run.device) for _ in range(2)]
    expected = [_gradient(loss, *each) for each in problems]
    captured = [Captured(loss, *each) for each in problems] if graphs else []
    side = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize(run.device)

    def work(index: int) -> tuple[Tensor, Tensor]:
        if not graphs:
            return _gradient(loss, *problems[index])
        captured[index].graph.replay()
        return captured[index].loss, captured[index].gradient

    def round_of(overlapping: bool) -> float:
        """Microseconds of both."""
        torch.cuda.synchronize(run.device)
        start = time.perf_counter()
        results = []
        for _ in range(PAIRS):
            for index in range(2):
                with torch.cuda.stream(side[index if overlapping else 0]):
                    results.append(work(index))
        torch.cuda.synchronize(run.device)
        microseconds = 1e6 * (time.perf_counter() - start) / PAIRS
        for found, wanted in zip(results, expected * PAIRS, strict=True):
            _same_bits(found, wanted)
        return microseconds

    alone, together = (min(round_of(overlapping) for _ in range(ROUNDS)) for overlapping in (False, True))
    return {"alone us": alone, "together us": together}
