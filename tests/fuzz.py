"""Malformed calls, each reproducible from its number alone: `python tests/fuzz.py [first [count]]`.

A call starts out valid, and one to three of its arguments are replaced by something else: tensors of other shapes,
dtypes, devices, layouts and subclasses, labels out of bounds, tensors whose memory was taken away, numbers that are
none, objects of other types. Every call must return or raise one of DOCUMENTED, of exactly that type (a subclass such
as NotImplementedError comes from somewhere else and names nothing); the raw ops, and autograd for the gradient that it
is given, may also raise torch's own NotImplementedError ("no kernel for this kind of tensor"). Where one argument of a
public function was replaced, the message must name it. Between them valid calls are made, whose results must not
change by a bit.

test_fuzz.py runs this in a process of its own, so that a crash is seen as one. The number of the call being made is
kept in the file LMF_FUZZ_PROGRESS.
"""

from __future__ import annotations

import collections
import json
import math
import os
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lmf_kernels
from lmf_kernels import FocalLoss, LDAMLoss, LMFLoss, _ops, lmf_loss
from lmf_kernels._call import Options
from lmf_kernels._native import _C

DOCUMENTED = (ValueError, TypeError, IndexError, RuntimeError)
VALID_EVERY = 20
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("native", "native", "native", "reference", "auto")

Arguments = dict[str, Any]


class Subclass(Tensor):
    """A tensor subclass without behaviour of its own."""


class Wrapper(Tensor):
    """A tensor subclass without memory, which runs every op on the tensor that it wraps."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrap = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return func(*unwrap[0], **unwrap[1])


def dead(t: Tensor, bytes_left: int = 0) -> Tensor:
    """`t` without (all of) its memory."""
    t = t.detach().clone()
    t.untyped_storage().resize_(min(bytes_left, t.untyped_storage().nbytes()))
    return t


def is_dead(t: Any) -> bool:
    """Whether PyTorch itself would crash on `t` (when it prints it, say)."""
    if type(t) is not Tensor or t.layout is not torch.strided or t.is_nested or t.numel() == 0:
        return False
    last = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() > t.untyped_storage().nbytes()


def odd_shape(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.choice((0, 1, 2, 3, 4, 7)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 7))))


def odd_tensor(rng: random.Random, t: Tensor) -> Any:
    """Something that resembles `t` but for one thing."""
    kinds: list[Callable[[], Any]] = [
        lambda: torch.zeros(odd_shape(rng), dtype=t.dtype),
        lambda: t.to(rng.choice(DTYPES)),
        lambda: t.to(rng.choice((torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool))),
        lambda: t.to(rng.choice((torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16, torch.uint64))),
        lambda: t.to("meta"),
        lambda: torch.empty(rng.choice(((0, 2**62), (2**31, 0), (2**40, 4))), dtype=t.dtype, device="meta"),
        lambda: torch.empty(rng.choice(((0, 2**62), (2**31, 0))), dtype=t.dtype),
        lambda: dead(t),
        lambda: dead(t, t.element_size()),
        lambda: dead(t.unsqueeze(-1)).squeeze(-1),
        lambda: t.to_sparse(),
        lambda: t.float().to_sparse_csr() if t.dim() == 2 else t.float().to_sparse(),
        lambda: t.float().to_mkldnn(),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([t.reshape(-1)[:1], t.reshape(-1)]),
        lambda: torch.nested.nested_tensor([t.reshape(-1)[:1], t.reshape(-1)], layout=torch.jagged),
        lambda: t.as_subclass(Subclass),
        lambda: Wrapper(t),
        lambda: t.to(torch.complex64).conj(),
        lambda: t.to(torch.complex64).conj().imag,
        lambda: torch.nn.Parameter(t.float().clone()),
        lambda: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
        lambda: t.reshape(-1)[:1].expand(t.shape) if t.numel() else t,
        lambda: t.new_zeros(()).expand(odd_shape(rng)),
        lambda: t.unsqueeze(rng.randrange(-t.dim() - 1, t.dim() + 1)),
        lambda: t.flatten(),
        lambda: t.reshape(t.shape + (1,) * (62 - t.dim())),
        lambda: t.new_zeros((1,) * 100) if t.dim() < 100 else t,
        lambda: t.new_zeros(()),
        lambda: t.clone().fill_(rng.choice((0, 1)) if not t.is_floating_point() else rng.choice((math.nan, math.inf))),
        lambda: -t,
        lambda: t.tolist(),
        lambda: t.numpy() if t.dtype != torch.bfloat16 else t.tolist(),
        lambda: odd_value(rng),
    ]
    return rng.choice(kinds)()


def odd_labels(rng: random.Random, t: Any) -> Any:
    if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.numel() == 0:
        return t
    t = t.clone()
    label = rng.choice((-1, -99, -101, 100, 255, 2**31 - 1, 2**31, 2**32, -(2**31) - 1, 2**62, -(2**63), 2**63 - 1))
    t.view(-1)[rng.randrange(t.numel())] = label
    return t


def odd_value(rng: random.Random) -> Any:
    numbers = (
        *(0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, -(10**400), 0.0, -0.0, -1.5, 1e308, 5e-324),
        *(math.nan, math.inf, -math.inf, 1j, True),
    )
    tensors = (torch.tensor(2.0), torch.tensor([1.0, 2.0]), torch.tensor(1j), torch.tensor(True))
    collections = ([], [1.0], (1.0, 2.0), (1.0, None), [[]], {}, range(3), frozenset())
    objects = (None, "mean", "", b"x", "cpu", object(), print, Ellipsis, torch.float32, float, slice(1))
    return rng.choice((*numbers, *tensors, *collections, *objects))


def batch(rng: random.Random) -> tuple[Tensor, Tensor, int]:
    classes = rng.choice((1, 2, 3, 5, 8, 17, 130, 200))
    inner = rng.choice(((), (), (), (3,), (2, 2)))
    rows = rng.choice((1, 2, 5, 33))
    z = torch.empty(rows, classes, *inner).uniform_(-3, 3).to(rng.choice(DTYPES))
    y = torch.randint(0, classes, (rows, *inner))
    if rng.random() < 0.2:
        z, y = z[0], y[0]
        if z.dim() > 1:
            z, y = z[:, 0], y[0]
            z, y = (z, y) if z.dim() == 1 else (z[:, 0], y[0])
    return z, y, classes


def options(rng: random.Random, classes: int) -> Arguments:
    found: Arguments = {"reduction": rng.choice(("none", "mean", "sum")), "backend": rng.choice(BACKENDS)}
    for name in ("margins", "ldam_weight", "focal_weight"):
        if rng.random() < 0.4:
            found[name] = torch.rand(classes, dtype=rng.choice(DTYPES))
    for name, values in {"alpha": (0, 1.0, 2), "beta": (0.0, 1), "gamma": (0, 0.5, 2.0), "s": (1, 30.0)}.items():
        if rng.random() < 0.4:
            found[name] = rng.choice(values)
    if found["reduction"] == "mean" and rng.random() < 0.3:
        found["normalizer"] = rng.choice((3, 2.5, torch.tensor(4.0), (1.0, torch.tensor(2.0))))
    return found


def replace(rng: random.Random, arguments: Arguments, names: list[str]) -> list[str]:
    """Replaces one to three arguments in place; returns their names."""
    changed = rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2, 3))))
    for name in changed:
        value = arguments.get(name)
        if name == "target" and rng.random() < 0.4:
            arguments[name] = odd_labels(rng, value)
        elif name in ("margins", "weight", "ldam_weight", "focal_weight") and not isinstance(value, Tensor):
            arguments[name] = odd_tensor(rng, torch.rand(rng.choice((1, 3, 5))))
        elif isinstance(value, Tensor):
            arguments[name] = odd_tensor(rng, value)
        else:
            arguments[name] = odd_value(rng)
    return changed


OPTIONS = [
    *("margins", "alpha", "beta", "gamma", "s", "weight", "ldam_weight", "focal_weight"),
    *("ignore_index", "reduction", "normalizer", "backend"),
]

Call = tuple[Callable[[], Any], list[str], Arguments]  # what to do, the replaced arguments, all arguments


def call_function(rng: random.Random) -> Call:
    z, y, classes = batch(rng)
    arguments: Arguments = {"input": z.requires_grad_(rng.random() < 0.5), "target": y, **options(rng, classes)}
    names = ["input", "target", *OPTIONS] if rng.random() < 0.5 else ["input", "target"]
    changed = replace(rng, arguments, names)
    if rng.random() < 0.03:
        arguments["backend"] = "triton"
        changed.append("backend")

    def run() -> None:
        loss = lmf_loss(**arguments)
        if loss.requires_grad:
            loss.sum().backward()

    return run, changed, arguments


def call_backward(rng: random.Random) -> Call:
    """A valid forward; what it is given in backward, and the tensors in between, are not."""
    z, y, classes = batch(rng)
    backend = rng.choice(BACKENDS)
    outer = odd_tensor(rng, torch.ones(y.shape))
    loss_dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if is_dead(outer) and (backend == "reference" or outer.dtype != loss_dtype):
        raise ValueError("PyTorch's autograd reads it before the loss does, or instead of it")
    arguments: Arguments = {"grad_output": outer}
    kill = rng.choice(("nothing", "logits", "target", "labels"))

    def run() -> None:
        leaf = z.requires_grad_()
        logits = leaf * 1
        labels = y.clone()
        loss = lmf_loss(logits, labels, reduction="none", backend=backend)
        if kill == "logits":
            logits.untyped_storage().resize_(0)
        elif kill == "target":
            labels.untyped_storage().resize_(0)
        elif kill == "labels":  # behind the version counter's back
            labels.data.fill_(rng.choice((-1, classes, 2**40, -(2**63))))
        torch.autograd.grad(loss, leaf, arguments["grad_output"])

    return run, ["torch's own message"], {**arguments, "input": z, "kill": kill, "backend": backend}


def call_raw_op(rng: random.Random) -> Call:
    z, y, classes = batch(rng)
    if z.dim() == 1:
        z, y = z[None], y[None]
    reduction = rng.randrange(3)
    arguments: Arguments = {"logits": z, "target": y}
    for name in ("margins", "ldam_weight", "focal_weight"):
        arguments[name] = torch.rand(classes) if rng.random() < 0.5 else None
    for name in ("ldam_normalizer", "focal_normalizer"):
        arguments[name] = torch.tensor(2.0) if reduction == 1 and rng.random() < 0.5 else None
    arguments.update(alpha=1.0, beta=1.0, gamma=1.5, s=rng.choice((1.0, 30.0)), ignore_index=-100, reduction=reduction)
    backend = rng.choice(list(_ops.OPS)) if rng.random() < 0.05 else "native"
    forward, backward = _ops.OPS[backend].forward, _ops.OPS[backend].backward
    if backend == "native" and rng.random() < 0.5:
        forward, backward = _C.native_forward, _C.native_backward
    if rng.random() < 0.5:
        changed = replace(rng, arguments, list(arguments))
        return raw(forward, changed, arguments)
    loss, saved, denominators = _ops.OPS["native"].forward(*arguments.values())
    arguments = {"grad_output": torch.ones_like(loss), "logits": z, "target": y, "saved": saved,
                 "denominators": denominators,
                 **{name: arguments[name] for name in Options._fields}}  # fmt: skip
    changed = replace(rng, arguments, list(arguments))
    return raw(backward, changed, arguments)


def raw(op: Callable[..., Any], changed: list[str], arguments: Arguments) -> Call:
    if len(changed) > 1 and any(map(is_dead, arguments.values())):
        raise ValueError("PyTorch prints all arguments where one has the wrong type")
    return lambda: op(*arguments.values()), changed, arguments


def call_module(rng: random.Random) -> Call:
    z, y, classes = batch(rng)
    kind = rng.choice((LMFLoss, LDAMLoss, FocalLoss))
    arguments: Arguments = {} if kind is FocalLoss else {"cls_num_list": [rng.randint(1, 99) for _ in range(classes)]}
    names = {
        LMFLoss: ["cls_num_list", "alpha", "beta", "gamma", "max_m", "s", "weight", "ldam_weight", "focal_weight",
                  "ignore_index", "reduction", "backend", "min_count"],
        LDAMLoss: ["cls_num_list", "max_m", "s", "weight", "ignore_index", "reduction", "backend", "min_count"],
        FocalLoss: ["gamma", "weight", "ignore_index", "reduction", "backend"],
    }[kind]  # fmt: skip
    if rng.random() < 0.5:
        changed = replace(rng, arguments, names)
        return lambda: kind(**arguments)(z, y), changed, arguments
    criterion = kind(**arguments, **({"weight": torch.ones(classes)} if kind is FocalLoss else {}))
    if rng.random() < 0.5:
        weight = odd_tensor(rng, torch.rand(classes))
        return lambda: criterion.set_weight(weight), ["weight"], {"weight": weight}
    call: Arguments = {"input": z, "target": y, "normalizer": None}
    changed = replace(rng, call, list(call))
    return lambda: criterion(**call), changed, call


def call_helper(rng: random.Random) -> Call:
    name = rng.choice(("class_counts", "ldam_margins", "effective_number_weights", "inverse_frequency_weights"))
    function = getattr(lmf_kernels, name)
    arguments: Arguments = {"cls_num_list": rng.choice(([3, 2, 1], torch.tensor([5, 9]), {1: 2.0, 0: 3}))}
    names = ["cls_num_list", "min_count"]
    if name == "class_counts":
        arguments = {"labels": rng.choice(([0, 1, 1], torch.tensor([0, 2, 2]))), "num_classes": 3}
        names = ["labels", "num_classes", "ignore_index"]
    elif name == "ldam_margins":
        names.append("max_m")
    elif name == "effective_number_weights":
        names.append("beta")
    changed = replace(rng, arguments, names)
    if arguments.get("num_classes") in (2**31, 2**63):  # memory that a machine may really have
        arguments["num_classes"] = -7
    return lambda: function(**arguments), changed, arguments


KINDS = (call_function, call_function, call_function, call_backward, call_raw_op, call_raw_op, call_module, call_helper)


def make_call(number: int) -> tuple[Call, str]:
    """Call `number`, always the same, whatever was called before; skips what cannot be constructed."""
    for attempt in range(100):
        rng = random.Random(number * 100 + attempt)
        torch.manual_seed(rng.randrange(2**31))
        kind = rng.choice(KINDS)
        try:
            return kind(rng), kind.__name__
        except Exception:  # torch refuses to make that tensor (a sparse boolean, a quantized scalar)
            continue
    raise AssertionError(f"no call could be made for number {number}")


def complaint(number: int, call: Call, kind: str, outcomes: collections.Counter[str]) -> str | None:
    """Makes the call; says what was wrong with its outcome."""
    run, changed, _ = call
    try:
        run()
    except Exception as error:
        outcomes[type(error).__name__] += 1
        below = kind in ("call_raw_op", "call_backward")
        allowed = (*DOCUMENTED, NotImplementedError) if below else DOCUMENTED
        if type(error) not in allowed:
            return f"call {number} ({kind}): {type(error).__name__}: {str(error)[:300]} [{changed}]"
        # Where C changed, it is the tables that do not fit.
        named = any(name in str(error) for name in (changed[0], "margins", "weight"))
        if not below and len(changed) == 1 and not named:
            return f"call {number} ({kind}): {type(error).__name__} does not name {changed[0]}: {str(error)[:300]}"
    else:
        outcomes["returned"] += 1
    return None


def valid_results() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for backend in ("native", "reference"):
        for shape in ((33, 5), (3, 200), (2, 4, 3)):
            z = torch.randn(shape, generator=generator, requires_grad=True)
            y = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
            loss = lmf_loss(z, y, weight=torch.arange(1.0, shape[1] + 1), backend=backend)
            found += [loss.detach(), *torch.autograd.grad(loss, z)]
    return found


def main(first: int = 0, count: int = 10_000) -> int:
    warnings.simplefilter("ignore")
    progress = os.open(os.environ.get("LMF_FUZZ_PROGRESS", os.devnull), os.O_WRONLY | os.O_CREAT, 0o644)
    outcomes: collections.Counter[str] = collections.Counter()
    complaints = []
    want = valid_results()
    for number in range(first, first + count):
        os.pwrite(progress, b"%12d" % number, 0)
        call, kind = make_call(number)
        if count == 1:
            print(kind, call[1], {name: describe(value) for name, value in call[2].items()}, flush=True)
        found = complaint(number, call, kind, outcomes)
        if found is not None:
            complaints.append(found)
        if number % VALID_EVERY == 0:
            outcomes["valid calls"] += 1
            if not all(map(torch.equal, valid_results(), want)):
                complaints.append(f"after call {number} valid calls give other results")
                break
    print(json.dumps({"calls": count, "outcomes": outcomes, "complaints": complaints}))
    return 1 if complaints else 0


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else tuple(value.shape)
        return f"{type(value).__name__} {shape} {value.dtype} {value.layout} {value.device}"
    return repr(value)[:80]


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
