"""Names and tensors between a checkpoint's fused experts and the linears of `ExpertList`.

A *fused name* is a parameter of the model as transformers builds it (``model.layers.0.mlp.experts.gate_up_proj``); the
names that callers use are those of the split model (``model.layers.0.mlp.experts.3.gate_proj.weight``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from calib.model.experts import ExpertList, expert_lists, fill_experts, fused_in_place

__all__ = ["ExpertTensors"]


class ExpertTensors:
    """The expert parameters of one skeleton, after `calib.model.experts.split_experts`."""

    def __init__(self, skeleton: nn.Module) -> None:
        self._skeleton = skeleton
        self._lists = expert_lists(skeleton)
        self._list_of: dict[str, tuple[str, ExpertList, str]] = {}  # by fused name
        self._parts: dict[str, frozenset[str]] = {}  # by fused name
        for name, experts in self._lists.items():
            for parameter in experts.layout.parameters:
                self._list_of[f"{name}.{parameter}"] = name, experts, parameter
                self._parts[f"{name}.{parameter}"] = frozenset(f"{name}.{part}" for part in experts.names(parameter))
        self._fused = {part: fused for fused, parts in self._parts.items() for part in parts}

    def fused(self, names: frozenset[str]) -> frozenset[str]:
        """The names with those of experts replaced by the fused names that hold them."""
        return frozenset(self._fused.get(name, name) for name in names)

    def split(self, names: frozenset[str]) -> frozenset[str]:
        """The names with fused names replaced by all that they hold."""
        return frozenset().union(*(self._parts.get(name, {name}) for name in names))

    def torn(self, names: frozenset[str]) -> frozenset[str]:
        """Fused names that ``names`` ask for in part, or whose layer's other experts' parameters are not asked for.

        A layer whose parameters are all asked for can keep the form it has in the checkpoint; of any other one the
        parameters are handed out one by one.
        """
        found: set[str] = set()
        for name, experts in self._lists.items():
            fused = {f"{name}.{parameter}" for parameter in experts.layout.parameters}
            touched = {one for one in fused if self._parts[one] & names}
            if touched and not all(self._parts[one] <= names for one in fused):
                found |= touched
        return frozenset(found)

    def parts(self, fused: str, tensor: Tensor, names: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        """The views of a fused parameter's ``tensor`` that ``names`` ask for; an ordinary name is its only part."""
        if fused not in self._list_of:
            yield fused, tensor
            return
        where, experts, parameter = self._list_of[fused]
        for part, view in experts.views(parameter, tensor):
            if f"{where}.{part}" in names:
                yield f"{where}.{part}", view

    def fill(self, fused: str, tensor: Tensor, names: frozenset[str]) -> None:
        """Give the experts' parameters among ``names`` their views of ``tensor``."""
        where, experts, parameter = self._list_of[fused]
        fill_experts(experts, parameter, tensor, {name.removeprefix(f"{where}.") for name in names})

    @contextlib.contextmanager
    def fused_in_place(self) -> Iterator[None]:
        """Inside, the skeleton is as transformers builds it."""
        with fused_in_place(self._skeleton, self._lists):
            yield

    def take(self) -> Iterator[tuple[str, Tensor]]:
        """What a loader has put into the fused modules, by fused name; they are on the meta device again after."""
        for fused, (_, experts, parameter) in self._list_of.items():
            tensor = experts.fused.get_parameter(parameter).detach()
            if not tensor.is_meta:
                empty = torch.empty_like(tensor, device="meta")
                experts.fused._parameters[parameter] = nn.Parameter(empty, requires_grad=False)
                yield fused, tensor
