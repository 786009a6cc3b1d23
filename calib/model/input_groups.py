"""Input groups: which linears of a block read the same tensor, seen by running the block once.

The experts of a mixture are not traced through the block, where a token reaches only a few of them: one expert is
traced by itself, and all of them have its groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from calib.model.experts import ExpertList, expert_lists
from calib.model.structure import find_linears, foreign_code

__all__ = ["BlockMap", "InputGroup", "merge_maps", "trace_block"]


@dataclasses.dataclass(frozen=True)
class InputGroup:
    """Linears of one block that read the same tensor, e.g. q, k and v.

    Args:
        linears: names relative to the block, in the order of their first call.
        calls: how often each is called in one pass (more than once only in unusual blocks).
        experts: for linears of an expert: the module that holds all experts, and the expert itself, by name in the
            block.
        routed: the block sends only some tokens here, in a way that we cannot see (experts that are no `ExpertList`).
        flops: floating-point operations of a pass from the block's start up to here, a token.
        width: numbers a token in the group's input.
    """

    linears: tuple[str, ...]
    calls: int = 1
    experts: str = ""
    expert: str = ""
    routed: bool = False
    flops: float = 0.0
    width: int = 0

    @property
    def point(self) -> str:
        """The module at whose call a pass through the block has this group's input."""
        return self.experts or self.linears[0]


@dataclasses.dataclass(frozen=True)
class BlockMap:
    """Groups in the order of execution, and the floating-point operations of a whole pass, a token."""

    groups: tuple[InputGroup, ...]
    flops: float

    def reaches(self, linears: Collection[str]) -> bool:
        """Whether all these linears are in groups, each with all tokens or with a router that is understood."""
        found = {name for group in self.groups for name in group.linears}
        return found.issuperset(linears) and not any(group.routed for group in self.groups)


def merge_maps(maps: Sequence[BlockMap]) -> BlockMap:
    """One map of what several passes through the same block showed: a linear that some of them did not call, or called
    with a part of the tokens, is routed."""
    merged: list[InputGroup] = []
    for one in maps:
        place = -1
        for group in one.groups:
            same = [i for i, other in enumerate(merged) if set(other.linears) & set(group.linears)]
            if same:
                place = same[0]
                routed = merged[place].routed or group.routed
                merged[place] = dataclasses.replace(merged[place], routed=routed)
            else:
                place += 1
                merged.insert(place, group)
    everywhere = [{name for group in one.groups for name in group.linears} for one in maps]
    groups = [
        group
        if all(names.issuperset(group.linears) for names in everywhere)
        else dataclasses.replace(group, routed=True)
        for group in merged
    ]
    return BlockMap(tuple(groups), max(one.flops for one in maps))


def _attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two products for ``[batch, heads, tokens, width]``; some releases of PyTorch refuse to count grouped queries."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (width + value[3])


_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): _attention_flops
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
}


@dataclasses.dataclass
class _Call:
    """What one module was seen to be called with."""

    tensors: list[int]  # numbers of the tensors
    tokens: int
    flops: float
    width: int


def trace_block(block: nn.Module, run: Callable[[], object], tokens: int) -> BlockMap:
    """The map of a block.

    Linears that the pass does not reach are in no group.

    Args:
        block: with its weights; run: one pass through it; tokens: in that pass.

    Raises:
        ModelError: the block cannot be run by itself.
    """
    lists = expert_lists(block)
    inside = tuple(f"{name}." for name in lists)
    watched: dict[str, nn.Module] = {n: m for n, m in find_linears(block).items() if not n.startswith(inside)}
    calls, flops = _watch(watched | lists, run, type(block).__name__)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, call in calls.items():
        groups.setdefault((*call.tensors, -1) if name in lists else tuple(call.tensors), []).append(name)
    result: list[InputGroup] = []
    for names in groups.values():
        first = calls[names[0]]
        if names[0] in lists:
            result += _expert_groups(names[0], lists[names[0]], first.flops / tokens)
            continue
        routed = first.tokens < tokens * len(first.tensors)
        result.append(InputGroup(tuple(names), len(first.tensors), "", "", routed, first.flops / tokens, first.width))
    return BlockMap(tuple(result), flops / tokens)


def _expert_groups(name: str, experts: ExpertList, flops: float) -> list[InputGroup]:
    """Groups of all experts of one list, traced on the first."""
    numbers = [number for number, _ in experts.named_children()]
    first: Any = experts.get_submodule(numbers[0])
    linears = find_linears(first)
    example = next(iter(linears.values())).weight
    assert isinstance(example, Tensor)
    width = next(m.in_features for m in linears.values() if isinstance(m, nn.Linear))
    rows = torch.zeros(2, width, dtype=example.dtype, device=example.device)
    calls, _ = _watch(linears, lambda: first(rows), type(first).__name__)
    shared: dict[tuple[int, ...], list[str]] = {}
    for linear, call in calls.items():
        shared.setdefault(tuple(call.tensors), []).append(linear)
    return [
        InputGroup(
            tuple(f"{name}.{number}.{linear}" for linear in names),
            1,
            name,
            f"{name}.{number}",
            False,
            flops,
            calls[names[0]].width,
        )
        for number in numbers
        for names in shared.values()
    ]


def _watch(modules: dict[str, nn.Module], run: Callable[[], object], where: str) -> tuple[dict[str, _Call], float]:
    """How the modules are called in one pass, in the order of their first call; floating-point operations of it."""
    inputs: list[Tensor] = []  # kept alive, so that addresses stay unique
    seen: dict[str, _Call] = {}
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = first_argument(args, kwargs)
            same = [i for i, x in enumerate(inputs) if _same_memory(x, tensor)]
            if not same:
                inputs.append(tensor)
            call = seen.setdefault(name, _Call([], 0, float(counter.get_total_flops()), tensor.shape[-1]))
            call.tensors.append(same[0] if same else len(inputs) - 1)
            call.tokens += tensor[..., 0].numel()

        return hook

    handles = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in modules.items()]
    try:
        with foreign_code(f"{where} cannot be run by itself"), counter:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen, float(counter.get_total_flops())


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor that a module is called with."""
    tensor: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return tensor


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.numel() > 0
