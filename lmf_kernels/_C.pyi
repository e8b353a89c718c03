"""The native extension (csrc/lmf.cpp)."""

from torch import Tensor

def native_forward(
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None,
    ldam_weight: Tensor | None,
    focal_weight: Tensor | None,
    ldam_normalizer: Tensor | None,
    focal_normalizer: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    s: float,
    ignore_index: int,
    reduction: int,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def native_backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    denominators: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
    s: float,
    ignore_index: int,
    reduction: int,
    /,
) -> Tensor: ...
def devices() -> list[str]: ...
def cpu_capability() -> str: ...
