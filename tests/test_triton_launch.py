"""The host side of the Triton backend, without a GPU: counters, launches, compilations, synchronisations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checks import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler, which the interpreter replaces")
triton_launch = pytest.importorskip("lmf_kernels.triton.launch")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gpu_offline import problem, stub_driver, whole  # noqa: E402

from lmf_kernels import lmf_loss  # noqa: E402


class Streams:
    """What the counters ask of CUDA."""

    current = 0
    capturing = False


@pytest.fixture
def streams(monkeypatch):
    streams = Streams()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: streams.capturing)
    monkeypatch.setattr(triton_launch.Device, "stream", lambda _: streams.current)
    return streams


@pytest.fixture
def device():
    device = triton_launch.Device(torch.device("cpu"))
    device.on_gpu = True
    return device


def test_capture_before_the_first_call_is_refused(streams, device):
    streams.capturing = True
    with pytest.raises(RuntimeError, match="warm up first"):
        device.counter()


def test_launches_that_may_overlap_never_share_a_counter(streams, device):
    eager = [device.counter(), device.counter()]
    assert eager[0] is eager[1]
    streams.current = 7
    other = device.counter()
    streams.capturing = True
    captured = [device.counter() for _ in range(device.SPARE // 2)]
    streams.capturing = False
    device.counter()  # makes new ones
    streams.capturing = True
    captured += [device.counter() for _ in range(device.SPARE // 2)]
    addresses = {counter.data_ptr() for counter in [eager[0], other, *captured]}
    assert len(addresses) == 2 + device.SPARE
    assert all(address % 16 == 0 for address in addresses), "as the kernels were compiled for"
    assert all((counter == 0).all() for counter in captured)
    streams.capturing, streams.current = False, 0
    assert device.counter() is eager[0]


@pytest.mark.parametrize("shape", [(70, 7), (20, 1000), (2, 40000), (2, 21, 8, 16)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_launches_and_nothing_else_on_the_device(shape, reduction):
    """No operation that would launch another kernel or wait for the device: no item, equal, sum, zeros or copy."""
    vector = torch.rand(shape[1])
    found = whole(
        lambda z, y: lmf_loss(z, y, margins=vector, weight=vector, reduction=reduction, backend="triton"),
        shape,
        torch.float32,
    )
    assert (found.launches, found.operations) == (2, ())


@pytest.mark.parametrize("C", [7, 8, 1000])
def test_no_compilation_for_another_number_of_rows(C):
    with stub_driver() as launched:
        for rows in (1, 2, 15, 16, 17, 32, 1000, 4096):
            z, y, table = problem((rows, C), torch.float32)
            loss = lmf_loss(z.requires_grad_(), y, margins=table, weight=table, backend="triton")
            loss.backward()
        assert len(launched) == 16
        for kernel in (triton_launch.forward_kernel, triton_launch.backward_kernel):
            assert [len(cache) for cache, *_ in kernel.device_caches.values()] == [1]
