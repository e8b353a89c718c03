"""Chunks of a linear classifier's logits: how large they are, how they are made, and where their gradients go."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import Backend
from ..math.rows import accumulation_dtype

MEMORY_BUDGET = 64 << 20  # bytes for a chunk of logits and what is computed from it
FEWEST_ROWS = 64  # of a chunk of whole rows: with fewer, matrix products wait for the weight from memory
MOST_ROWS = 4096  # of a chunk of a part of the classes
# Bytes of temporaries that are as wide as the features. Larger on GPUs, where each product is a launch; on CPUs mixed
# dtypes in one operation cost a hidden copy in the wider one.
CPU_SLICE, GPU_SLICE = 2 << 20, 16 << 20
EPS = 1e-12  # as F.normalize's
HALVES = (torch.float16, torch.bfloat16)


class Plan(NamedTuple):
    """How many rows and classes a chunk of logits has at most; classes = C means whole rows."""

    rows: int
    classes: int


def plan_chunks(rows: int, num_classes: int, dtype: torch.dtype, backend: Backend, budget: int) -> Plan:
    """The default budget grows with the logits, so that their chunks never become many."""
    budget = budget or max(MEMORY_BUDGET, rows * num_classes * dtype.itemsize // 32)
    copies = backend.extra_copies * (2 if dtype in HALVES else 1)
    elements = max(1, budget // (dtype.itemsize * (1 + copies)))
    whole = elements // max(num_classes, 1)
    if whole >= min(rows, FEWEST_ROWS):
        return Plan(_even(rows, whole), num_classes)
    some = _even(rows, min(MOST_ROWS, max(FEWEST_ROWS, elements // 1024)))
    return Plan(some, _even(num_classes, max(1, elements // some)))


def _even(size: int, most: int) -> int:
    """The step that cuts `size` into as few steps of at most `most` as possible, of nearly equal size."""
    return -(-size // -(-size // most)) if size else 1


def steps(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, max(step, 1)):
        yield slice(start, min(size, start + step))


class Head:
    """The classifier: makes chunks of logits and takes their gradients, into those that are needed."""

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        normalize: bool,
        plan: Plan,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.features, self.weight, self.bias, self.plan = features, weight, bias, plan
        self.needs = needs
        self.half = features.dtype in HALVES
        self.acc = accumulation_dtype(features.dtype)
        self.whole_rows = plan.classes >= weight.shape[0]
        self.buffer = features.new_empty(min(plan.rows, len(features)) * min(plan.classes, len(weight)))
        self.slice_bytes = CPU_SLICE if features.device.type == "cpu" else GPU_SLICE
        self.width = max(1, self.slice_bytes // (weight.element_size() * max(weight.shape[1], 1)))  # classes of a slice
        self.norms = self.inverse = None
        if normalize:
            self.norms = weight.new_empty(len(weight), dtype=self.acc)
            for part in steps(len(weight), self.width):
                torch.linalg.vector_norm(weight[part], dim=1, dtype=self.acc, out=self.norms[part])
            self.inverse = self.norms.clamp_min(EPS).reciprocal()
        # A weight gradient of half products adds up in float32, as do features' gradients over chunks of classes.
        self.grad_features = self.grad_weight = self.grad_bias = None
        if needs[0]:
            dtype = features.dtype if self.whole_rows else self.acc
            self.grad_features = torch.zeros_like(features, dtype=dtype, memory_format=torch.contiguous_format)
        if needs[1]:
            self.grad_weight = torch.zeros_like(weight, dtype=self.acc, memory_format=torch.contiguous_format)
        if needs[2]:
            self.grad_bias = torch.zeros_like(weight[:, 0], dtype=self.acc)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        for rows in steps(len(self.features), self.plan.rows):
            for classes in steps(len(self.weight), self.plan.classes):
                yield rows, classes

    def logits(self, rows: slice, classes: slice) -> Tensor:
        features, weight = self.features[rows], self.weight[classes]
        logits = self.buffer[: len(features) * len(weight)].view(len(features), len(weight))
        if self.bias is not None and self.inverse is None:
            return torch.addmm(self.bias[classes], features, weight.t(), out=logits)
        torch.mm(features, weight.t(), out=logits)
        if self.inverse is not None:
            self._scale(logits, classes)
            if self.bias is not None:
                logits += self.bias[classes]
        return logits

    def _scale(self, logits: Tensor, classes: slice) -> None:
        """Divides the columns by the norms of the weights; a slice at a time where that takes a wider copy."""
        assert self.inverse is not None
        inverse = self.inverse[classes]
        step = max(1, self.slice_bytes // (4 * max(len(logits), 1))) if self.half else len(inverse)
        for part in steps(len(inverse), step):
            logits[:, part].mul_(inverse[part])

    def take(self, gradient: Tensor, rows: slice, classes: slice) -> None:
        """Adds the gradients from a chunk's gradient, which may be overwritten."""
        features, weight = self.features[rows], self.weight[classes]
        if self.grad_bias is not None:
            self.grad_bias[classes] += gradient.sum(0, dtype=self.acc)
        if self.inverse is not None:
            self._scale(gradient, classes)
        if self.grad_weight is not None:
            total = self.grad_weight[classes]
            if self.half:  # a product adds up in float32 inside and is rounded once
                for part in steps(len(weight), self.width):
                    total[part] += gradient[:, part].t() @ features
            else:
                total.addmm_(gradient.t(), features)
        if self.grad_features is not None:
            total = self.grad_features[rows]
            if self.whole_rows:
                torch.mm(gradient, weight, out=total)
            elif self.half:
                total += gradient @ weight
            else:
                total.addmm_(gradient, weight)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of features, weight and bias, each empty where it is not needed; the last call."""
        nothing = self.features.new_empty(0)
        self.buffer = nothing
        if self.grad_weight is not None and self.norms is not None and self.inverse is not None:
            # d (W / |W|): what is left of the gradient beside W's own direction. Below EPS the norm is a constant.
            square = torch.where(self.norms > EPS, self.inverse * self.inverse, 0.0)
            for part in steps(len(self.weight), self.width):
                total, weight = self.grad_weight[part], self.weight[part].to(self.acc)
                along = (total * weight).sum(1).mul_(square[part])
                total.addcmul_(weight, along[:, None], value=-1)
        return (
            nothing.clone() if self.grad_features is None else self.grad_features.to(self.features.dtype),
            nothing.to(self.acc, copy=True) if self.grad_weight is None else self.grad_weight,
            nothing.to(self.acc, copy=True) if self.grad_bias is None else self.grad_bias,
        )
