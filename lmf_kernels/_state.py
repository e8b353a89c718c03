"""The losses' margins and class weights as buffers, and what a state_dict holds of them."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ._validate import check_dense, check_memory

_WEIGHTS = ("ldam_weight", "focal_weight")


class ClassBuffers(nn.Module):
    """A module with the buffers `margins`, `ldam_weight` and `focal_weight`, of which some may be None.

    Its state_dict holds what nn.CrossEntropyLoss's would: class weights where there are any, given or set later.
    Margins, and weights of ones that nobody gave, follow from the constructor's arguments.
    """

    margins: Tensor | None
    ldam_weight: Tensor | None
    focal_weight: Tensor | None

    __jit_unused_properties__ = ("_is_hf_initialized",)

    def __init__(self, margins: Tensor | None, weights: dict[str, Tensor | None]) -> None:
        """`weights` holds what was given for each term that has class weights; None is ones, one for each margin."""
        super().__init__()
        # What reset_parameters() writes; None is ones.
        self._built = {name: None if given is None else _on_host(given) for name, given in weights.items()}
        # Under torch.device("meta") on the CPU, as their values are known and would be lost.
        home = torch.get_default_device()
        home = torch.device("cpu") if home.type == "meta" else home
        if margins is not None:
            self._built["margins"] = _on_host(margins)
            margins = margins.to(home)
        self.register_buffer("margins", margins, persistent=False)
        for name in _WEIGHTS:
            given = weights.get(name)
            if given is None and name in weights and margins is not None:
                self.register_buffer(name, torch.ones(len(margins), device=home), persistent=False)
            else:
                self.register_buffer(name, given)

    def _misfit(self, input: Tensor) -> Exception | None:
        """How an input does not fit this module, in the words of its constructor; None where it does."""
        raise NotImplementedError

    def _explain(self, error: Exception, input: Tensor) -> None:
        """Raises in the constructor's words what a call ended with, if that is an error of the same kind."""
        misfit = self._misfit(input)
        if type(misfit) is type(error):
            raise misfit from None

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Copies class weights, (C,), in place into every term's weights.

        In place, so that a schedule (`DeferredReweighting`) needs no recompilation under torch.compile and no new
        capture of a CUDA graph.

        Raises:
            RuntimeError: the loss was built without class weights (FocalLoss alone, which does not know C), or the
                weights are on the meta device.
            TypeError, ValueError: not a dense real tensor of shape (C,).
        """
        buffers = [buffer for buffer in (self.ldam_weight, self.focal_weight) if buffer is not None]
        if not buffers:
            raise RuntimeError("set_weight needs a loss built with weight=; start with weight=torch.ones(C)")
        check_dense("weight", weight, "(C,)")
        if weight.is_complex() or weight.is_quantized:
            raise TypeError(f"weight must be real, got {weight.dtype}")
        if weight.is_meta and not buffers[0].is_meta:
            raise RuntimeError(f"weight must hold values for the loss on {buffers[0].device}, got one on meta")
        if weight.shape != buffers[0].shape:
            raise ValueError(f"weight must have shape {tuple(buffers[0].shape)}, got {tuple(weight.shape)}")
        check_memory("weight", weight)
        for buffer in buffers:
            buffer.copy_(weight)
        self._non_persistent_buffers_set.difference_update(_WEIGHTS)  # from now on they are state

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Writes the margins and class weights that the loss was built with.

        For models that are built without memory: `Module.to_empty()` leaves every buffer undefined. (Weights that were
        given as tensors on the meta device never had values; they become NaN, until a checkpoint brings some.)
        """
        for name in self._built:
            self._restore(name)

    def _restore(self, name: str) -> None:
        buffer, table = self._buffers[name], self._built[name]
        if buffer is None:
            return
        if table is None:
            buffer.fill_(1.0)
            self._non_persistent_buffers_set.add(name)
        elif table.is_meta:
            buffer.fill_(float("nan"))
        else:
            buffer.copy_(table)

    @property
    def _is_hf_initialized(self) -> bool:
        return bool(self.__dict__.get("_hf_initialized", False))

    @_is_hf_initialized.setter
    @torch.no_grad()
    def _is_hf_initialized(self, value: bool) -> None:
        """Set by transformers' from_pretrained, which has emptied the buffers that it did not load and mark."""
        self.__dict__["_hf_initialized"] = value
        for name in self._built:
            if not getattr(self._buffers[name], "_is_hf_initialized", False):
                self._restore(name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Margins stay those of cls_num_list; weights that nobody gave need not be there."""
        found = {name: state_dict.get(prefix + name) for name in (*_WEIGHTS, "margins", "weight")}
        if found["margins"] is not None:
            del state_dict[f"{prefix}margins"]  # a copy of the caller's dictionary
            warnings.warn(
                f"{type(self).__name__}: {prefix}margins of this checkpoint are not loaded: margins come from "
                "cls_num_list, and checkpoints no longer hold them",
                stacklevel=2,
            )
        absent = self._non_persistent_buffers_set
        optional = [name for name, table in self._built.items() if table is None]
        unset = absent.intersection(optional)
        for name in self._built:
            # nn.CrossEntropyLoss calls them `weight`, as LinearLMFLoss's predecessor nn.Linear calls its matrix.
            if name in absent or found[name] is not None or found["weight"] is None or found["weight"].dim() != 1:
                continue
            state_dict[prefix + name] = found[name] = found["weight"]
            state_dict.pop(f"{prefix}weight", None)
        for name in optional:
            (absent.add if found[name] is None else absent.discard)(name)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        for name in optional:
            weight = found[name]
            if weight is None:
                (absent.add if name in unset else absent.discard)(name)
            elif found["margins"] is not None and not weight.is_meta and bool((weight == 1).all()):
                absent.add(name)  # an old checkpoint, which held ones where there were no weights


def _on_host(table: Tensor) -> Tensor:
    """A copy in the CPU's memory, but for what has no values."""
    return table.detach().clone() if table.is_meta else table.detach().to("cpu", copy=True)
