"""The CPU kernels of every instruction set, and their independence of the number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import INTERPRETED, check

from lmf_kernels import lmf_loss

ROOT = Path(__file__).parents[1]
FILES = ("test_edges.py", "test_layouts.py", "test_pairwise.py", "test_precision.py")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="native kernels do not run in the interpreter")


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_lower_instruction_sets_pass_the_same_tests(capability):
    """The other test files run the best kernels of this machine."""
    environment = {**os.environ, "LMF_CPU_CAPABILITY": capability, "LMF_TEST_BACKENDS": "native"}
    shown = "from lmf_kernels._backends import cpu_capability as c; print(c())"
    found = subprocess.run([sys.executable, "-c", shown], cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.stdout.strip() != capability:
        pytest.skip(f"this CPU has no {capability}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    run = subprocess.run([*command, *(f"tests/{file}" for file in FILES)], cwd=ROOT, env=environment, text=True,
                         capture_output=True)  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("shape", [(5000, 7), (3000, 23), (300, 1000), (3, 5, 96, 96), (40, 8142)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_threads_change_no_bit(shape, reduction):
    logits = torch.randn(shape)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            z = logits.clone().requires_grad_()
            loss = lmf_loss(z, target, reduction=reduction, backend="native")
            loss.backward(torch.ones_like(loss))
            results.append((loss.detach(), z.grad))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("class_first", [False, True])
def test_tails_of_every_size(dtype, class_first):
    """Tiles and vectors that end anywhere, in memory that ends with them: `make sanitize` sees a step beyond it."""
    generator = torch.Generator().manual_seed(0)
    for classes in range(1, 35):
        whole, labels = torch.randn(66, classes, generator=generator).to(dtype), torch.arange(66) % classes
        want = _loss_and_gradient(whole, labels)
        for rows in (*range(1, 34), 63, 64, 65):
            z = whole[:rows].t().clone().t() if class_first else whole[:rows].clone()
            loss, grad = _loss_and_gradient(z, labels[:rows])
            torch.testing.assert_close(loss, want[0][:rows], rtol=2e-5, atol=1e-30)
            torch.testing.assert_close(grad, want[1][:rows])


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.25, 4.5, 7.0])
def test_powers_by_products_and_by_logarithms(gamma):
    """Half-integer exponents take another way; confident, even and hopeless rows."""
    gaps = torch.tensor([-60.0, -30.0, -8.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 8.0, 30.0, 60.0])
    z = torch.stack((gaps, torch.zeros(11), torch.full((11,), -0.5)), 1)
    check(z, torch.zeros(11, dtype=torch.int64), "native", gamma=gamma, reduction="none", beta=2.0, alpha=0.0)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 5, 256, 256), torch.float32),
        ((16, 5, 256, 256), torch.bfloat16),
        ((8, 3, 256, 256), torch.float64),
        ((4, 16, 257, 171), torch.float32),  # no row of pixels is aligned
        ((8, 21, 256, 256), torch.float32),
        ((9, 1_000_003), torch.float32),
    ],
    ids=str,
)
def test_large_gradients_are_those_of_small_ones(shape, dtype):
    """Gradients that are streamed past the caches, against those of one sample each, which are not."""
    z = 3 * torch.randn(shape, dtype=dtype)
    y = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    loss, grad = _loss_and_gradient(z, y)
    for sample in range(shape[0]):
        want = _loss_and_gradient(z[sample : sample + 1], y[sample : sample + 1])
        assert torch.equal(loss[sample : sample + 1], want[0])
        assert torch.equal(grad[sample : sample + 1], want[1])


def _loss_and_gradient(z, y):
    z = z.detach().requires_grad_()
    loss = lmf_loss(z, y, reduction="none", backend="native")
    return loss.detach(), torch.autograd.grad(loss, z, torch.ones_like(loss))[0]
