"""Time and peak memory of a linear classifier with its loss, forward and backward, as a Markdown table.

    python benchmarks/linear_report.py            # on a quiet machine; --quick shows that everything runs

Compared: lmf_kernels.linear_lmf_loss and the unfused Linear + lmf_loss, Linear + F.cross_entropy (the base of the time
ratios), torch's F.linear_cross_entropy in chunks, and Liger's fused linear cross-entropy where it runs. Only ours and
the unfused pair compute the LMF loss; the others compute cross-entropy. Runs that do not work here say why.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import interleaved, machine, ratio
from peak_memory import allocated_peak, linear_step_extra
from torch import Tensor

from lmf_kernels import linear_lmf_loss, lmf_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BASE = "Linear + F.cross_entropy"
CASES = [((1024, 512, 20_000), torch.float32), ((2048, 512, 131_072), torch.float32)]
QUICK = [((64, 16, 2000), torch.float32)]
LARGE = (8192, 1024, 131_072), torch.bfloat16


def contenders(device: torch.device) -> dict[str, Loss]:
    """name -> loss of (features, weight, target)."""

    def torch_chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())

    losses: dict[str, Loss] = {
        BASE: lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
        "Linear + lmf_loss": lambda x, weight, target: lmf_loss(F.linear(x, weight), target),
        "linear_lmf_loss": lambda x, weight, target: linear_lmf_loss(x, weight, target),
        "linear_lmf_loss, normalize": lambda x, weight, target: linear_lmf_loss(x, weight, target, normalize=True),
        "F.linear_cross_entropy": torch_chunked,
    }
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        losses["Liger fused linear CE"] = lambda x, weight, target: liger_fused_linear_cross_entropy(x, weight, target)
    except ImportError as error:
        print(f"Liger is not installed: {error}")
    return losses


def problem(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rows, features, classes = shape
    x = torch.randn(rows, features, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(classes, features, device=device, dtype=dtype) * features**-0.5).requires_grad_()
    return x, weight, torch.randint(0, classes, (rows,), device=device)


def check(shape: tuple[int, int, int], device: torch.device) -> None:
    """Compares loss and gradients with those of the unfused pair in float64 on a few rows; raises AssertionError."""
    x, weight, target = problem((32, *shape[1:]), torch.float32, device)
    loss = linear_lmf_loss(x, weight, target)
    exact = lmf_loss(F.linear(x.double(), weight.double()), target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    for got, want in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(exact, (x, weight)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def measure(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rounds: int) -> None:
    x, weight, target = problem(shape, dtype, device)

    def step(loss: Loss) -> None:
        x.grad = weight.grad = None
        loss(x, weight, target).backward()

    gradients = sum(t.numel() * t.element_size() for t in (x, weight))
    logits = shape[0] * shape[2] * x.element_size()
    runs, extra = {}, {}
    for name, loss in contenders(device).items():
        try:
            step(loss)
            x.grad = weight.grad = None
            extra[name] = allocated_peak(lambda loss=loss: step(loss), device) - gradients
            runs[name] = lambda loss=loss: step(loss)
        except Exception as error:
            print(f"{name} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    x.grad = weight.grad = None
    seconds = interleaved(runs, device, rounds)
    size = f"({', '.join(map(str, shape))}), {str(dtype).removeprefix('torch.')}"
    print(f"\n{size}: logits {logits / 1e6:.0f} MB, gradients {gradients / 1e6:.0f} MB\n")
    print(f"| (N, D, C) = {size} | time, s | of {BASE} | peak beyond gradients, MB | of the logits |")
    print("|---|---|---|---|---|")
    for name in runs:
        print(
            f"| {name} | {statistics.median(seconds[name]):.3f} | {ratio(seconds, name, BASE):.2f} "
            f"| {extra[name] / 1e6:.0f} | {100 * extra[name] / logits:.1f}% |"
        )


def report_large() -> None:
    """The peak at a size that takes minutes to compute on a CPU: from fake tensors, which compute nothing."""
    (rows, features, classes), dtype = LARGE
    logits = rows * classes * dtype.itemsize
    print(
        f"\n({rows}, {features}, {classes}), bfloat16: logits {logits / 1e6:.0f} MB; counted on fake tensors beyond "
        f"inputs, gradients and the weight gradient's float32 accumulator ({classes * features * 4 / 1e6:.0f} MB)\n"
    )
    print("| backend | normalize | peak, MB | of the logits |\n|---|---|---|---|")
    for backend, device in (("native", "cpu"), ("reference", "cpu"), ("triton", "cuda"), ("native", "cuda")):
        for normalize in (False, True):
            arguments = rows, features, classes, dtype, backend, torch.device(device)
            peak = linear_step_extra(*arguments, normalize=normalize, bias=True)
            print(f"| {backend} ({device}) | {normalize} | {peak / 1e6:.1f} | {100 * peak / logits:.2f}% |")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that everything runs")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(machine(options.device))
    for shape, dtype in QUICK if options.quick else CASES:
        check(shape, options.device)
        measure(shape, dtype, options.device, options.rounds)
    if not options.quick:
        report_large()
    return 0


if __name__ == "__main__":
    sys.exit(main())
