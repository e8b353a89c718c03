"""What to say of calls that do not fit, in the words of who made them. Nothing here runs for a call that fits."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_MULTI_LABEL = (
    "the loss is single-label, one class a sample; several classes a sample (multi-label) need nn.BCEWithLogitsLoss"
)
_warned_of_one_class = False


def target_hint(target: Tensor, logits: Sequence[int]) -> str:
    """What probably makes a target fit logits of this shape, with its separator; empty where nothing is known."""
    given, logits = tuple(target.shape), tuple(logits)
    class_axis = int(len(logits) > 1)
    wanted = logits[:1] * class_axis + logits[1 + class_axis :]
    if class_axis and given == (logits[0], 1, *logits[2:]):
        if logits[1] == 1:
            return ": one logit a sample is binary classification; use nn.BCEWithLogitsLoss, or two logits"
        return ": squeeze the channel: target.squeeze(1).long()"
    if given == logits:
        convert = ".int()" if target.dtype == torch.bool else ""
        one_hot = f"one-hot labels become class indices with target{convert}.argmax({class_axis}); {_MULTI_LABEL}"
        if target.dtype.is_floating_point:
            return f": class probabilities (soft labels) are not supported; {one_hot}"
        return f": {one_hot}"
    if target.dtype.is_floating_point:
        indices = "convert class indices with target.long(); " if given == wanted else ""
        return f": {indices}class probabilities (soft labels) are not supported"
    return "" if target.dtype == torch.int64 else ": convert it with target.long()"


def warn_of_one_class() -> None:
    """Once a process, and not from within a graph, which a warning would break."""
    global _warned_of_one_class
    if torch.compiler.is_compiling() or _warned_of_one_class:
        return
    _warned_of_one_class = True
    warnings.warn(
        "lmf_kernels: logits of a single class always have loss 0 and gradient 0, as softmax gives that class "
        "probability 1; for binary classification with one logit use nn.BCEWithLogitsLoss, or two logits",
        stacklevel=4,
    )


def module_misfit(name: str, built_from: str, tables: Mapping[str, Tensor | None], input: Tensor) -> Exception | None:
    """How the logits and the module `name`, whose tables were built from an argument, do not fit; None if they do."""
    known = {key: table for key, table in tables.items() if table is not None}
    if not known or input.dim() == 0:
        return None
    classes, built = input.shape[input.dim() > 1], len(next(iter(known.values())))
    if classes == built:
        return device_misfit(name, known, input)
    shape = tuple(input.shape)
    hint = "; classes are dimension 1: input.movedim(-1, 1)" if input.dim() > 2 and shape[-1] == built else ""
    return ValueError(
        f"{name} was built for {built} classes (the length of {built_from}), input has {classes}: its shape is {shape}"
        f"{hint}"
    )


def device_misfit(name: str, tensors: Mapping[str, Tensor], input: Tensor) -> Exception | None:
    for key, tensor in tensors.items():
        if tensor.device != input.device:
            device = str(input.device)
            if tensor.is_meta:
                advice = (
                    "it has no values yet; loss.to_empty(device=...), loss.reset_parameters(), then load a checkpoint"
                )
            else:
                advice = f"move the loss as you move the model, loss.to({device!r})"
            return RuntimeError(f"{name} (its {key}) is on {tensor.device}, input on {device}: {advice}")
    return None
