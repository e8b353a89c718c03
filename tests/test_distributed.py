"""Data parallelism and gradient accumulation: the joint batch's loss and gradients, by two gloo processes."""

from __future__ import annotations

import os

import pytest
import torch
import torch.multiprocessing
from checks import assert_exact
from distributed_worker import COUNTS, MICRO, WORLD, gradients, joint_batch, losses, model, work
from oracle import expected

from lmf_kernels import FocalLoss, LDAMLoss, LMFLoss, global_normalizer

KINDS = list(losses())
DEADLINE = 180


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank computed; one pair of processes for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        processes = torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD, join=False)
        try:
            finished = processes.join(DEADLINE)  # the first exit; raises what a worker raised
            assert finished or processes.join(DEADLINE), "the two processes hang"
        finally:
            for process in processes.processes:
                process.kill()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def joint():
    """Loss name -> (loss, gradients) of one process with the joint batch and 'mean'."""
    results = {}
    for kind, criterion in losses().items():
        net, (x, y) = model(), joint_batch()
        loss = criterion(net(x), y)
        loss.backward()
        results[kind] = loss.detach(), gradients(net)
    return results


def test_joint_loss_is_the_oracles(joint):
    """What the ranks are compared with."""
    x, y = joint_batch()
    criterion = losses()["lmf"]
    options = dict(
        margins=criterion.margins, ldam_weight=criterion.ldam_weight, focal_weight=criterion.focal_weight, s=3.0
    )
    assert_exact(joint["lmf"][0], expected(model()(x), y, **options)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["one batch", "accumulated"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_ranks_train_as_on_the_joint_batch(wrapper, step, kind, ranks, joint):
    loss, grads = joint[kind]
    for rank in ranks:
        got_loss, got_grads = rank[f"{kind}, {step}, {wrapper}"]
        torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
        for got, want in zip(got_grads, grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


def test_means_of_each_rank_are_something_else(ranks, joint):
    """The comparison above can fail: without the normaliser it does."""
    loss, grads = joint["lmf"]
    got_loss, got_grads = ranks[0]["lmf, without normalizer, ddp"]
    assert (got_loss - loss).abs() > 0.05 * loss
    assert not torch.allclose(got_grads[0], grads[0], rtol=0.05)


def numbers(pair):
    return [float(n) for n in pair]


def test_bad_labels_count_as_kept_rows_of_weight_zero(ranks):
    w = losses()["lmf"].ldam_weight.tolist()
    for rank in ranks:
        assert numbers(rank["bad labels"]) == pytest.approx([(w[1] + 2 * w[2] + w[0]) / WORLD, 6 / WORLD])
        assert [n.shape for n in rank["bad labels"]] == [(), ()]


def test_one_packed_reduction(ranks):
    assert [rank["reductions"] for rank in ranks] == [[(2,)], [(2,)]]


def test_a_group_of_its_own(ranks):
    w = losses()["lmf"].ldam_weight.tolist()
    assert numbers(ranks[0]["own group"]) == pytest.approx([w[1] + 2 * w[2], 3])
    assert numbers(ranks[1]["own group"]) == pytest.approx([w[0], 3])


def test_ranks_without_kept_samples(ranks):
    w = losses()["lmf"].ldam_weight.tolist()
    for rank in ranks:
        assert numbers(rank["nothing kept"]) == [0, 0]
        assert numbers(rank["one rank keeps"]) == pytest.approx([3 * w[0] / WORLD, 3 / WORLD])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_in_one_process(kind, joint):
    """Uneven micro-batches, no process group."""
    criterion, net = losses()[kind], model()
    sizes = (*MICRO[0], *MICRO[1])
    xs, ys = (part.split(sizes) for part in joint_batch())
    normalizer = global_normalizer(ys, criterion)
    total = 0.0
    for x, y in zip(xs, ys, strict=True):
        loss = criterion(net(x), y, normalizer=normalizer)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, joint[kind][0], rtol=1e-12, atol=0)
    for got, want in zip(gradients(net), joint[kind][1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("criterion", [LMFLoss(COUNTS), LDAMLoss(COUNTS), FocalLoss()])
def test_one_process_has_the_denominators_of_mean(criterion):
    z, y = torch.randn(2, 4, 5, dtype=torch.float64), torch.randint(0, 4, (2, 5))
    y[0, 1] = 3
    criterion.ignore_index = 3
    assert_exact(criterion(z, y, global_normalizer(y, criterion)), criterion(z, y).double())
    assert_exact(criterion(z, y, global_normalizer(y.to(torch.uint8), criterion)), criterion(z, y).double())
    nothing = torch.full_like(y, 3)
    loss = criterion(z.requires_grad_(), nothing, global_normalizer(nothing, criterion))
    assert loss.isnan() and (torch.autograd.grad(loss, z)[0] == 0).all()


def test_the_host_is_not_asked():
    """Meta tensors hold no values: any look at one raises."""
    y = torch.zeros(8, 5, dtype=torch.long, device="meta")
    pair = global_normalizer([y, y], LMFLoss(COUNTS).to("meta"))
    assert [(n.shape, n.device.type) for n in pair] == [((), "meta"), ((), "meta")]


@pytest.mark.parametrize(
    "target, loss, error, words",
    [
        (torch.zeros(3, dtype=torch.long), torch.nn.CrossEntropyLoss(), TypeError, "CrossEntropyLoss"),
        (torch.zeros(3, dtype=torch.int32), LMFLoss(COUNTS), TypeError, "int32"),
        (torch.zeros(3), LMFLoss(COUNTS), TypeError, "float32"),
        ([0, 1, 2], LMFLoss(COUNTS), TypeError, "int"),
        ([], LMFLoss(COUNTS), ValueError, "empty"),
        (torch.zeros(3, dtype=torch.long, device="meta"), LMFLoss(COUNTS), RuntimeError, "meta"),
    ],
)
def test_errors(target, loss, error, words):
    with pytest.raises(error, match=words):
        global_normalizer(target, loss)
