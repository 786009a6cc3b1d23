"""One product for packed linears that read the same tensor (q, k and v; gate and up), found while the model runs.

A model's linears share one `InputGroups`. In the first pass it sees which of them are called with the same tensor one
after the other, as `calib.model.input_groups` does, and merges the weights of each such group. From then on the first
member that is called with a tensor computes the rows of all, and every other member takes its rows, once, and only
while that very tensor lives and was not written to. Whatever does not fit (gradients, inference mode, other inputs,
tensors that were read or changed since) is multiplied member by member, by views of the same memory.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ptq.runtime.dispatch import Kernel, Merged, PackedWeight

__all__ = ["InputGroups", "MergedProduct", "is_capturing"]

_MOST_IDLE_PRODUCTS = 16
"""Merged products that not all members used, after which a group is given up: it costs more than it saves."""


class Member(Protocol):
    """What a group needs of a packed linear (`ptq.runtime.linear.QuantLinear`)."""

    in_features: int
    bias: nn.Parameter | None
    merged: tuple[MergedProduct, int] | None

    def weight_to_merge(self, kernel: Kernel) -> PackedWeight | None:
        """What the kernel prepared; ``None`` if it must stay as it is."""

    def join(self, group: MergedProduct, index: int, weight: PackedWeight) -> None:
        """Be a member, and multiply by ``weight`` where the group does not."""


class InputGroups:
    """What the linears of a model share: it finds the groups, and computes their products."""

    def __init__(self) -> None:
        self._input: tuple[weakref.ref[Tensor], int] | None = None
        self._members: list[weakref.ref[Member]] = []

    def product(self, linear: Member, kernel: Kernel, x: Tensor) -> Tensor | None:
        """What ``linear`` gives for ``x``, where its group computes it; ``None`` where it has to do so itself."""
        if torch.compiler.is_compiling():  # what eager passes found is traced
            return None if linear.merged is None else linear.merged[0].traced(linear.merged[1], x)
        if x.is_inference():  # such tensors do not say when they were written to
            return None
        if linear.merged is None:
            self._note(linear, kernel, x)
            return None
        assert kernel.merging is not None
        if x.numel() > kernel.merging.most_vectors * linear.in_features:
            return None
        group, index = linear.merged
        return group.product(index, linear.bias, x)

    def __getstate__(self) -> dict[str, Any]:
        """Copies find their groups anew."""
        return {"_input": None, "_members": []}

    def _note(self, linear: Member, kernel: Kernel, x: Tensor) -> None:
        if self._input is not None and self._input[0]() is x and self._input[1] == x._version:
            self._members.append(weakref.ref(linear))
            return
        if not is_capturing():  # merging copies weights, and its memory would be the graph's
            members = [member for one in self._members if (member := one()) is not None and member.merged is None]
            _merge(members, kernel)
        self._input, self._members = (weakref.ref(x), x._version), [weakref.ref(linear)]


def _merge(linears: Sequence[Member], kernel: Kernel) -> None:
    """Merge those of the linears that can be, and have not been captured in a graph as they are."""
    assert kernel.merging is not None
    alike: dict[Hashable, dict[int, tuple[Member, PackedWeight]]] = {}
    for linear in linears:
        weight = linear.weight_to_merge(kernel)
        if weight is not None:
            bias = None if linear.bias is None else linear.bias.dtype
            alike.setdefault((kernel.merging.key(weight), bias), {})[id(linear)] = (linear, weight)
    for members in alike.values():
        if len(members) > 1:
            with torch.inference_mode(False), torch.no_grad():
                whole, parts = kernel.merging.merge([weight for _, weight in members.values()])
            group = MergedProduct(kernel, whole, parts, [linear.bias for linear, _ in members.values()])
            for index, (linear, _) in enumerate(members.values()):
                linear.join(group, index, parts[index].weight)


@dataclasses.dataclass
class _Result:
    """A product for a tensor, and who has not taken its rows yet."""

    x: weakref.ref[Tensor]
    version: int
    capturing: bool
    rows: Tensor
    waiting: set[int]

    def serves(self, index: int, x: Tensor) -> bool:
        same = self.x() is x and self.version == x._version and self.capturing == is_capturing()
        return same and index in self.waiting


class MergedProduct:
    """The product of a group.

    Args:
        kernel: of all members.
        weight: of all rows.
        members: where each has its own.
        biases: of the members; all or none.
    """

    def __init__(
        self,
        kernel: Kernel,
        weight: PackedWeight,
        members: Sequence[Merged],
        biases: Sequence[nn.Parameter | None],
    ) -> None:
        self.valid = True
        self._kernel, self._weight, self._members, self._biases = kernel, weight, members, biases
        self._bias: tuple[tuple[int, ...], Tensor] | None = None
        self._result: _Result | None = None
        self._traced: tuple[Tensor, Tensor] | None = None
        self._idle = 0

    def product(self, index: int, bias: nn.Parameter | None, x: Tensor) -> Tensor | None:
        """Rows of a member for ``x``; ``None`` if the group is no more.

        Args:
            index: of the member.
            bias: that it has now.
            x: ``[..., in_features]``.
        """
        if bias is not self._biases[index] or self._idle >= _MOST_IDLE_PRODUCTS:
            self.dissolve()
        if not self.valid:
            return None
        result = self._result
        if result is None or not result.serves(index, x):
            result = self._computed(x)
        result.waiting.discard(index)
        if not result.waiting:
            self._result, self._idle = None, 0
        own = self._members[index]
        return result.rows[..., own.start : own.start + own.weight.out_features]

    def traced(self, index: int, x: Tensor) -> Tensor | None:
        """`product` for ``torch.compile``, which has neither versions nor weak references: the members' order in a pass
        decides, and the last one leaves nothing behind."""
        assert self._kernel.merging is not None
        few = x.numel() <= self._kernel.merging.most_vectors * self._weight.in_features
        if not self.valid or not few or (self._bias is None and self._biases[0] is not None):
            return None
        if index == 0:
            self._traced = (x, self._kernel.product(x, self._weight, None if self._bias is None else self._bias[1]))
        elif self._traced is None or self._traced[0] is not x:
            return None
        rows = self._traced[1]
        if index == len(self._members) - 1:
            self._traced = None
        own = self._members[index]
        return rows[..., own.start : own.start + own.weight.out_features]

    def dissolve(self) -> None:
        """Every member multiplies by itself from now on."""
        self.valid, self._result = False, None

    def _computed(self, x: Tensor) -> _Result:
        self._idle += self._result is not None
        rows = self._kernel.product(x, self._weight, self._all_biases())
        waiting = set(range(len(self._members)))
        self._result = _Result(weakref.ref(x, self._forget), x._version, is_capturing(), rows, waiting)
        return self._result

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        if self._result is not None and self._result.x is dead:
            self._result, self._idle = None, self._idle + 1

    def _all_biases(self) -> Tensor | None:
        given = [bias for bias in self._biases if bias is not None]
        if not given:
            return None
        versions = tuple(bias._version for bias in given)
        if self._bias is None or self._bias[0] != versions:
            whole = given[0].new_zeros(self._weight.out_features)
            for bias, own in zip(given, self._members, strict=True):
                whole[own.start : own.start + own.weight.out_features] = bias.detach()
            self._bias = (versions, whole)
        return self._bias[1]


def is_capturing() -> bool:
    """Whether what runs now is recorded in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
