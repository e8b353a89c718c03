"""Classes spread over gloo processes against the single-process loss: the oracle on the whole logits."""

from __future__ import annotations

import datetime
import functools
import gc
import os
import signal
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checks import INTERPRETED, assert_exact
from oracle import expected
from ranks import run
from torch import Tensor

from lmf_kernels import (
    ClassShares,
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LinearLMFLoss,
    LMFLoss,
    global_normalizer,
    linear_lmf_loss,
    lmf_loss,
)

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter's process tests Triton alone"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed"),
]


def share(sizes: tuple[int, ...]) -> slice:
    """This rank's classes."""
    first = sum(sizes[: dist.get_rank()])
    return slice(first, first + sizes[dist.get_rank()])


def counts_of(classes: int) -> Tensor:
    return torch.linspace(1000, 3, classes).long()


# ---- lmf_loss -------------------------------------------------------------------------------------------------------
TABLES = ("none", "whole", "shares")
OPTIONS: list[dict[str, Any]] = [
    dict(s=5.0),
    dict(alpha=0.0, gamma=0.5),
    dict(beta=0.0, s=30.0),
    dict(s=1.0, gamma=0.0, ignore_index=3),
    dict(alpha=1.5, beta=0.7, s=12.0, normalizer=(3.0, 7.0)),
]


def compare_losses(sizes: tuple[int, ...]) -> None:
    """All reductions, dtypes, backends, options and kinds of tables, in turns."""
    group, mine, classes = dist.new_group(), share(sizes), sum(sizes)
    case = 0
    for backend in ("native", "reference"):
        for reduction in ("none", "mean", "sum"):
            for options in OPTIONS:
                if "normalizer" in options and reduction != "mean":
                    continue
                case += 1
                tables = TABLES[case % 3]
                dtype = (torch.float64, torch.float32, torch.float32, torch.bfloat16)[case % 4]
                shape = ((11, classes), (3, classes, 2, 2))[case % 2]
                torch.manual_seed(case)
                z = (3 * torch.randn(shape)).to(dtype)
                y = torch.randint(0, classes, (shape[0], *shape[2:]))
                y.view(-1)[2] = options.get("ignore_index", -100)
                margins, ldam_weight, focal_weight = torch.rand(3, classes)
                given = dict(margins=margins, ldam_weight=ldam_weight, focal_weight=focal_weight)
                own = {name: table if tables == "whole" else table[mine] for name, table in given.items()}
                if tables == "none":
                    given, own = {}, {}
                local = z[:, mine].clone().requires_grad_()
                loss = lmf_loss(local, y, reduction=reduction, backend=backend, class_group=group, **own, **options)
                outer = torch.rand_like(loss)
                dist.broadcast(outer, 0)
                exact_loss, exact_grad = expected(z, y, reduction=reduction, grad_output=outer, **given, **options)
                what = f"{backend} {reduction} {options} {tables} {dtype} {shape}"
                assert_exact(loss, exact_loss, what)
                if local.numel():
                    assert_exact(torch.autograd.grad(loss, local, outer)[0], exact_grad[:, mine], what)
                else:
                    assert torch.autograd.grad(loss, local, outer)[0].shape == local.shape


def special_rows_and_edges() -> None:
    sizes = (3, 4)
    group, mine = dist.new_group(), share(sizes)
    inf, nan = float("inf"), float("nan")
    z = torch.randn(9, 7)
    z[0, 5], z[1, 1], z[2, 6] = nan, inf, -inf
    z[3, :3] = -inf  # no finite competitor on rank 0, where the target is
    z[4, 0:3], z[4, 4:] = -inf, -inf  # none anywhere
    z[5, 0] = -inf  # the target's own
    z[6] += 1e4
    z[7, :] = nan  # ignored
    z[8] = torch.tensor([40.0, 0, 0, 0, 0, 0, -3])  # confident
    y = torch.tensor([0, 0, 1, 2, 3, 0, 6, -100, 0])
    for reduction in ("none", "sum"):
        for backend in ("native", "reference"):
            local = z[:, mine].clone().requires_grad_()
            loss = lmf_loss(local, y, s=3.0, reduction=reduction, backend=backend, class_group=group)
            exact_loss, exact_grad = expected(z, y, s=3.0, reduction=reduction)
            assert_exact(loss, exact_loss)
            assert_exact(torch.autograd.grad(loss.sum(), local)[0], exact_grad[:, mine])
    # A rank whose share holds no target, no kept row, and labels of nobody.
    y = torch.tensor([0, 1, 2])
    local = z[6:, mine].nan_to_num().requires_grad_()
    loss = lmf_loss(local, y, class_group=group)
    assert_exact(torch.autograd.grad(loss, local)[0], expected(z[6:].nan_to_num(), y)[1][:, mine])
    nothing = lmf_loss(local, torch.full((3,), -100), class_group=group)
    assert nothing.isnan() and not torch.autograd.grad(nothing, local)[0].any()
    for backend in ("native", "reference"):
        with pytest.raises(IndexError, match=r"target 7 is out of bounds: labels must lie in \[0, 7\)"):
            lmf_loss(local, torch.tensor([0, 7, 1]), class_group=group, backend=backend)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(lmf_loss(local, y, class_group=group), local, create_graph=True)


def count_collectives() -> None:
    calls = []
    all_reduce = dist.all_reduce

    def counted(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        calls.append(str(op).rpartition(".")[2])
        return all_reduce(tensor, op, group, async_op)

    dist.all_reduce = counted
    group, mine = dist.new_group(), share((3, 4))
    y, weight = torch.tensor([0, 6, 3]), torch.rand(7)[mine]
    for reduction in ("none", "mean"):
        local = torch.randn(3, 7)[:, mine].clone().requires_grad_()
        calls.clear()
        loss = lmf_loss(local, y, weight=weight, margins=weight, reduction=reduction, class_group=group)
        assert calls == ["MAX", "SUM"]
        loss.sum().backward()
        assert calls == ["MAX", "SUM"]
        x, head = torch.randn(3, 5).requires_grad_(), torch.randn(7, 5)[mine].clone().requires_grad_()
        calls.clear()
        loss = linear_lmf_loss(x, head, y, weight=weight, reduction=reduction, memory_budget=64, class_group=group)
        assert calls == ["MAX", "SUM"]
        loss.sum().backward()
        assert calls == ["MAX", "SUM", "SUM"], "the features' gradient"


# ---- linear_lmf_loss and the modules --------------------------------------------------------------------------------
def compare_linear(sizes: tuple[int, ...]) -> None:
    group, mine, classes = dist.new_group(), share(sizes), sum(sizes)
    for case in range(12):
        torch.manual_seed(case)
        dtype = (torch.float64, torch.float32)[case % 2]
        reduction = ("none", "mean", "sum")[case % 3]
        normalize, budget = case % 4 >= 2, (None, 600)[case // 6]
        features, head, bias = (torch.randn(shape, dtype=dtype) for shape in ((10, 6), (classes, 6), (classes,)))
        y = torch.randint(0, classes, (10,))
        y[3] = -100
        tables = dict(margins=torch.rand(classes), ldam_weight=torch.rand(classes), focal_weight=torch.rand(classes))
        options = dict(s=4.0, reduction=reduction)

        whole = [t.double().clone().requires_grad_() for t in (features, head, bias)]
        x, w, b = whole
        z = F.linear(F.normalize(x, dim=1), F.normalize(w, dim=1), b) if normalize else F.linear(x, w, b)
        exact, exact_grad = expected(z.detach(), y, **tables, **options)
        exact_grads = torch.autograd.grad(z, whole, exact_grad)

        own = [t.clone().requires_grad_() for t in (features, head[mine], bias[mine])]
        if case % 2:
            tables = {name: table[mine] for name, table in tables.items()}
        loss = linear_lmf_loss(
            own[0], own[1], y, linear_bias=own[2], normalize=normalize, class_group=group,
            backend=("native", "reference")[case % 2], memory_budget=budget, **tables, **options,
        )  # fmt: skip
        close(loss, exact)
        for again in (True, False):
            grads = torch.autograd.grad(loss.sum(), own, retain_graph=again)
            for got, want in zip(grads, (exact_grads[0], exact_grads[1][mine], exact_grads[2][mine]), strict=True):
                close(got, want)


def close(got: Tensor, want: Tensor) -> None:
    """Products round too, so elements are held against the largest one."""
    error = 1e-12 if got.dtype == torch.float64 else 1e-5
    largest = want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=error, atol=error * largest)


def compare_modules() -> None:
    group, classes = dist.new_group(), 7
    mine, counts = share((4, 3)), counts_of(7)
    z, y = torch.randn(9, classes), torch.randint(0, classes, (9,))
    for make in (
        lambda **kw: LMFLoss(counts, s=4.0, weight=torch.linspace(0.5, 2, classes), **kw),
        lambda **kw: LDAMLoss(counts, s=4.0, **kw),
        lambda **kw: FocalLoss(**kw),
    ):
        whole, spread = make(), make(class_group=group)
        torch.testing.assert_close(spread(z[:, mine], y), whole(z, y), rtol=1e-5, atol=0)
    heads = [LinearLMFLoss(5, counts, normalize=True, class_group=group) for _ in range(2)]
    head = heads[0]
    assert head.linear.weight.shape == (mine.stop - mine.start, 5) and head.margins.shape == (classes,)
    parts = [torch.empty(size, 5) for size in (4, 3)]
    for rank, part in enumerate(parts):
        if rank == dist.get_rank():
            part.copy_(head.linear.weight.detach())
        dist.broadcast(part, rank)
    assert not torch.equal(parts[0][:3], parts[1]), "every rank draws its own rows"
    same = torch.rand(1)
    first = same.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, same), "other random numbers go on alike"
    single = LinearLMFLoss(5, counts, normalize=True)
    with torch.no_grad():
        single.linear.weight.copy_(torch.cat(parts))
        single.linear.bias.zero_()
        head.linear.bias.zero_()
    x = torch.randn(9, 5)
    torch.testing.assert_close(head(x, y), single(x, y), rtol=1e-5, atol=0)
    torch.testing.assert_close(head.logits(x), single.logits(x)[:, mine])

    fresh = dist.new_group()  # its first call is the compiled one, with the exchange
    compiled = torch.compile(lambda z: lmf_loss(2 * z, y, class_group=fresh), backend="eager")
    torch.testing.assert_close(compiled(z[:, mine]), lmf_loss(2 * z, y), rtol=1e-5, atol=0)

    lmf_loss(z[:, mine], y, class_group=group)
    # Several heads over one group: the function keeps the first one's shares, ClassShares are explicit.
    other = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"class_group gives this rank . classes \(of \(4, 3\)\), got 2"):
        lmf_loss(other, torch.tensor([0, 1, 2, 3]), class_group=group)
    shares = ClassShares(group, 2)
    assert (shares.sizes, shares.total, shares.first) == ((2, 2), 4, 2 * dist.get_rank())
    lmf_loss(other, torch.tensor([0, 1, 2, 3]), class_group=shares)
    for wrong in ("tp", 3):
        with pytest.raises(TypeError, match="class_group must be a process group or ClassShares"):
            lmf_loss(other, torch.tensor([0, 1, 2, 3]), class_group=wrong)
    with pytest.raises(ValueError, match=r"weight must have shape \(2,\) \(this rank's share\) or \(4,\)"):
        lmf_loss(other, torch.tensor([0, 1, 2, 3]), weight=torch.ones(3), class_group=shares)


# ---- DTensor and two-dimensional meshes -----------------------------------------------------------------------------
def compare_dtensor() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for classes in (7, 6, 4):  # 7 = 3 + 3 + 1; 4 = 2 + 2 + 0
        z, y = torch.randn(5, classes), torch.randint(0, classes, (5,))
        w = torch.rand(classes)
        logits = distribute_tensor(z, mesh, [Shard(1)]).requires_grad_()
        for target in (y, distribute_tensor(y, mesh, [Replicate()])):
            loss = lmf_loss(logits, target, s=4.0, weight=w)
            exact, exact_grad = expected(z, y, s=4.0, weight=w)
            assert_exact(loss, exact)
            (grad,) = torch.autograd.grad(loss, logits)
            assert grad.placements == logits.placements
            assert_exact(grad.full_tensor(), exact_grad)
    with pytest.raises(ValueError, match="sharded on its class axis"):
        lmf_loss(distribute_tensor(z, mesh, [Shard(0)]), y)
    with pytest.raises(ValueError, match="class_group must be None for DTensor"):
        lmf_loss(logits, y, class_group=dist.group.WORLD)


def data_and_class_parallel() -> None:
    """2 x 2: rows over one dimension of the mesh, classes over the other, as one process would have it."""
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    data, classes = mesh.get_group("data"), mesh.get_group("classes")
    d, c = mesh.get_local_rank("data"), mesh.get_local_rank("classes")
    rows, columns = slice(6 * d, 6 * d + 6), (slice(0, 4), slice(4, 9))[c]
    x, head, y = torch.randn(12, 5).double(), torch.randn(9, 5).double(), torch.randint(0, 9, (12,))
    y[2] = -100
    w = torch.rand(9).double()
    normalizer = (w[y[y >= 0]].sum(), (y >= 0).sum())

    z = (x @ head.t()).requires_grad_()
    exact, exact_grad = expected(z.detach(), y, s=4.0, weight=w)
    own_x, own_head = x[rows].clone().requires_grad_(), head[columns].clone().requires_grad_()
    for linear in (False, True):
        if linear:
            loss = linear_lmf_loss(
                own_x, own_head, y[rows], s=4.0, weight=w, normalizer=normalizer, class_group=classes
            )
        else:
            loss = lmf_loss(
                own_x @ own_head.t(), y[rows], s=4.0, weight=w[columns], normalizer=normalizer, class_group=classes
            )
        grad_x, grad_head = torch.autograd.grad(loss, (own_x, own_head))
        if not linear:
            dist.all_reduce(grad_x, group=classes)  # as a tensor-parallel linear layer does
        dist.all_reduce(grad_head, group=data)
        total = loss.detach().clone()
        dist.all_reduce(total, group=data)
        close(total, exact)
        close(grad_x, (exact_grad @ head)[rows])
        close(grad_head, (exact_grad.t() @ x)[columns])


def compare_modules_of_shares(sizes: tuple[int, ...]) -> None:
    """Class counts and weights given as this rank's share: whole margins' values, and the whole loss."""
    group, mine, classes = dist.new_group(), share(sizes), sum(sizes)
    local = sizes[dist.get_rank()]
    for rarest in (0, classes - 1):  # on the first rank that holds a class, and on the last
        counts = counts_of(classes)
        counts[rarest] = 2
        weight = torch.linspace(0.5, 2, classes)
        z, y, x = torch.randn(9, classes), torch.randint(0, classes, (9,)), torch.randn(9, 5)
        shares = ClassShares(group, local)
        for make, tables in (
            (lambda n, **kw: LMFLoss(n, s=4.0, **kw), ("weight", "ldam_weight", "focal_weight")),
            (lambda n, **kw: LDAMLoss(n, s=4.0, **kw), ("weight",)),
        ):
            for table in tables:
                whole = make(counts, **{table: weight})
                spread = make(counts[mine], class_group=shares, **{table: weight[mine]})
                assert spread.margins.shape == spread.ldam_weight.shape == (local,)
                torch.testing.assert_close(spread.margins, whole.margins[mine], rtol=1e-6, atol=0)
                torch.testing.assert_close(spread(z[:, mine], y), whole(z, y), rtol=1e-5, atol=0)
        spread.set_weight(torch.ones(local))
        whole.set_weight(torch.ones(classes))
        torch.testing.assert_close(spread(z[:, mine], y), whole(z, y), rtol=1e-5, atol=0)
        for loss in (whole, spread):
            DeferredReweighting(loss, counts, epoch=0)(0)
        torch.testing.assert_close(spread.ldam_weight, whole.ldam_weight[mine])
        if local != classes:
            with pytest.raises(ValueError, match=f"cls_num_list must hold {classes} counts"):
                DeferredReweighting(spread, counts[:2])
            with pytest.raises(ValueError, match=f"loss must hold the class weights of all {classes} classes"):
                global_normalizer(y, spread)

        head = LinearLMFLoss(5, counts[mine], weight=weight[mine], class_group=shares)
        assert head.linear.weight.shape == (local, 5) and head.margins.shape == (local,)
        same = LinearLMFLoss(5, counts, weight=weight, class_group=shares)
        same.linear.load_state_dict(head.linear.state_dict())
        torch.testing.assert_close(head(x, y), same(x, y), rtol=1e-5, atol=0)

    with pytest.raises(ValueError, match=rf"cls_num_list must hold the {classes} classes .* or the {local} of this"):
        LMFLoss(torch.full((classes + 1,), 5), class_group=shares)
    mixed = counts if dist.get_rank() == 0 else counts[mine]
    with pytest.raises(ValueError, match="all classes on all ranks or this rank's share on all, got both"):
        LMFLoss(mixed, class_group=shares)


def groups_are_freed() -> None:
    """No loss and no head keeps a group, and with it its threads, beyond destroy_process_group."""
    group, mine = dist.new_group(), share((3, 4))
    alive = weakref.ref(group)
    z, y = torch.randn(3, 7)[:, mine].clone().requires_grad_(), torch.tensor([0, 6, 3])
    x = torch.randn(3, 5).requires_grad_()
    lmf_loss(z, y, class_group=group).backward()
    criterion = LMFLoss(counts_of(7), class_group=group)
    head = LinearLMFLoss(5, counts_of(7), class_group=group)
    criterion(z, y).backward()
    kept = head(x, y)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert alive() is None
    for call in (lambda: criterion(z, y), lambda: head(x, y), kept.backward):
        with pytest.raises(RuntimeError, match="class_group: the process group has been destroyed"):
            call()


# ---- failures -------------------------------------------------------------------------------------------------------
def one_rank_fails() -> None:
    """Last, as it breaks its group."""
    group, mine = dist.new_group(timeout=datetime.timedelta(seconds=3)), share((3, 4))
    z, y = torch.randn(3, 7)[:, mine], torch.tensor([0, 6, 3])
    lmf_loss(z, y, class_group=group)
    weight = torch.ones(7)
    if dist.get_rank() == 1:
        weight = weight[:5]  # a mistake on one rank
    start = time.monotonic()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        lmf_loss(z, y, weight=weight, class_group=group)
    assert time.monotonic() - start < 30
    if dist.get_rank() == 1:
        time.sleep(6)  # alive, but never comes to the reduction
        assert caught.type is ValueError
        assert "weight must have shape (4,) (this rank's share) or (7,)" in str(caught.value)
    else:
        assert caught.type is RuntimeError and "another rank raised an error or ended" in str(caught.value)
        assert str(caught.value).startswith("class_group: the max-reduction of the rows' largest logits failed")


def one_rank_is_killed() -> None:
    """Between building the head and its first collective."""
    limit = 20.0
    group = dist.new_group(timeout=datetime.timedelta(seconds=limit))
    head = LinearLMFLoss(5, counts_of(7), class_group=group)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="another rank raised an error or ended before it came here") as caught:
        head(torch.randn(3, 5), torch.tensor([0, 6, 3]))
    assert str(caught.value).startswith("class_group: the max-reduction of the rows' largest logits failed")
    assert time.monotonic() - start < limit + 5


# ---- the tests: one start of processes for each number of ranks ------------------------------------------------------
CASES: dict[int, list[tuple[Callable[..., None], Any]]] = {
    2: [
        (compare_losses, (5, 3)),
        (compare_losses, (150, 1)),
        (special_rows_and_edges, None),
        (count_collectives, None),
        (compare_linear, (5, 8)),
        (compare_modules, None),
        (compare_modules_of_shares, (5, 3)),
        (groups_are_freed, None),
        (one_rank_fails, None),
    ],
    3: [
        (compare_losses, (2, 7, 4)),
        (compare_losses, (4, 0, 3)),
        (compare_linear, (0, 5, 4)),
        (compare_linear, (2, 9, 3)),
        (compare_modules_of_shares, (2, 7, 4)),
        (compare_modules_of_shares, (0, 5, 4)),
        (compare_dtensor, None),
    ],
    4: [(data_and_class_parallel, None)],
}


@functools.cache
def outcomes(ranks: int) -> dict[int, list[str | None]]:
    """What each rank says of each case: None, or the error."""
    return run(ranks, CASES[ranks])


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        pytest.param(ranks, case, id="-".join([str(ranks), function.__name__, *map(str, argument or ())]))
        for ranks, cases in CASES.items()
        for case, (function, argument) in enumerate(cases)
    ],
)
def test_ranks(ranks, case):
    for rank, errors in outcomes(ranks).items():
        assert errors[case] is None, f"rank {rank} of {ranks}:\n{errors[case]}"


def test_a_killed_rank():
    for rank, (error,) in run(3, [(one_rank_is_killed, None)], killed=frozenset({1})).items():
        assert error is None, f"rank {rank}:\n{error}"


def test_without_a_process_group():
    with pytest.raises((TypeError, RuntimeError), match="class_group"):
        lmf_loss(torch.randn(2, 3), torch.tensor([0, 1]), class_group=object())
