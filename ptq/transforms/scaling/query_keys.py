"""Scales of queries and keys: ``q / s`` and ``k * s`` give the same products, if a rotary embedding lets them.

A rotary embedding turns two channels of a head into each other; both must have one scale. Which channels these are is
tried: the two usual orders, for all channels of a head, then for the first r, as many as are turned.

    half      channels j and j + r/2 of the first r          alternate   channels 2j and 2j + 1 of the first r

These trials have wide scales and a narrow limit, because slow pairs hardly turn within a short text.

Where queries and keys have norms of their own, the scales go into those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from calib.model.structure import linear_weight
from ptq.transforms.scaling.channel_paths import ChannelPath
from ptq.transforms.scaling.trial import Trial
from ptq.transforms.scaling.uses import ScaleUse, Scaling
from ptq.transforms.tracing import Trace

__all__ = ["Heads", "heads_of", "query_key_scaling", "rotary_pairs"]


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of an attention, seen from its values.

    Args:
        width: channels of a head.
        keys_of: for every query head, its head of keys and values.
    """

    width: int
    keys_of: tuple[int, ...]

    @property
    def queries(self) -> int:
        return len(self.keys_of)

    @property
    def keys(self) -> int:
        return max(self.keys_of) + 1


@dataclasses.dataclass(frozen=True)
class _Side:
    """Where the queries or the keys come from: positions along tensors, a head after the other.

    Args:
        parameters: a linear's weight and bias, or a norm's; offset: of the first, as in `ScaleUse`.
        length: of those tensors along their first axis.
        places: int64 ``[heads, width]``; ``[1, width]`` where all heads share a norm.
    """

    parameters: tuple[str, ...]
    offset: float
    length: int
    places: Tensor


def heads_of(path: ChannelPath, width: int) -> Heads:
    """The heads behind a path from values to the linear that reads attention's output.

    Args:
        path: every column has a row; width: columns of a head there.
    """
    rows = torch.unique(path.index)  # sorted
    number = torch.searchsorted(rows, path.index)[::width] // width
    return Heads(width, tuple(number.tolist()))


def query_key_scaling(
    block: nn.Module, trial: Trial, found: Trace, path: ChannelPath, heads: Heads, name: str = "qk"
) -> Scaling | None:
    """The scaling of queries and keys, the finest that passes; ``None`` if nothing does.

    Args:
        block: with its weights; trial: of it; found: its trace.
        path: from the values to attention's output; heads: of it.
        name: of the scaling.
    """
    for queries, keys in _sides(block, found, path, heads):
        make = _maker(queries, keys, heads, name)
        if not trial.passes(make(torch.zeros(heads.width, dtype=torch.int64))):
            continue  # not even one scale a head: these are no queries and keys
        turned = _turned(heads.width, lambda pairs, make=make: trial.passes_strictly(make(pairs)))  # type: ignore[misc]
        for pairs in rotary_pairs(heads.width, turned):
            scaling = make(pairs)
            if trial.passes_strictly(scaling):
                return scaling
    return None


def rotary_pairs(width: int, turned: int) -> Iterator[Tensor]:
    """Number of the scale of every channel of a head, int64 ``[width]``, for every order of pairs worth a trial.

    Alternate pairs are only tried over the whole head: which of the last ones hardly turn and which do not turn cannot
    be told apart, and scales for pairs are right for both. Half pairs of too few channels fail at their first channels,
    which turn fast.

    Args:
        width: of a head; turned: its first channels that a rotary embedding turns, at least.
    """
    if turned == 0:
        yield torch.arange(width)
        return
    if width % 2 == 0:
        yield torch.arange(width // 2).repeat(2)
        yield torch.arange(width // 2).repeat_interleave(2)
    for count in range(turned + turned % 2, width, 2):
        yield torch.cat([torch.arange(count // 2).repeat(2), torch.arange(count // 2, width - count // 2)])


def _turned(width: int, free: Callable[[Tensor], bool]) -> int:
    """The fewest first channels without which all others can have scales of their own."""
    channels = torch.arange(width)
    low, high = 0, width  # the answer is in this range, ends included
    while low < high:
        middle = (low + high) // 2
        if free(torch.where(channels >= middle, channels - middle, -1)):
            high = middle
        else:
            low = middle + 1
    return low


def _maker(queries: _Side, keys: _Side, heads: Heads, name: str) -> Callable[[Tensor], Scaling]:
    """Scale numbers of a head's channels (-1: none) -> the scaling of all heads."""

    def make(pairs: Tensor) -> Scaling:
        count = int(pairs.max()) + 1
        shared = len(queries.places) == 1 or len(keys.places) == 1
        own_q = [0] * heads.queries if shared else list(heads.keys_of)
        own_k = [0] * heads.keys if shared else list(range(heads.keys))
        size = count * (1 if shared else heads.keys)
        uses = _uses(queries, pairs, count, own_q, -1) + _uses(keys, pairs, count, own_k, 1)
        return Scaling(name, size, uses)

    return make


def _uses(side: _Side, pairs: Tensor, count: int, owners: Sequence[int], power: int) -> tuple[ScaleUse, ...]:
    """``owners``: for every head of the side, the head whose scales it takes."""
    index = torch.full((side.length,), -1)
    for places, owner in zip(side.places, owners, strict=False):
        index[places] = torch.where(pairs < 0, -1, pairs + owner * count)
    first, *others = side.parameters
    return (
        ScaleUse(first, 0, power, index, side.offset),
        *(ScaleUse(parameter, 0, power, index) for parameter in others),
    )


def _sides(block: nn.Module, found: Trace, path: ChannelPath, heads: Heads) -> Iterator[tuple[_Side, _Side]]:
    """What may be the queries and the keys: norms before the attention, else rows of linears."""
    before = list(found.calls)[: list(found.calls).index(path.target)]
    norms = [name for name in before if name in found.norms and not found.norms[name].readers]
    pairs = [(a, b) for a in norms for b in norms if a != b]
    for q, k in pairs:
        sides = _norm_side(block, found, q, heads.queries, heads), _norm_side(block, found, k, heads.keys, heads)
        if sides[0] is not None and sides[1] is not None and sides[0].offset == sides[1].offset:
            yield sides[0], sides[1]
    linears = [name for name in before if found.calls[name].output.ndim > 1 and name not in found.norms]
    tall = {name: linear_weight(block.get_submodule(name)).shape[0] for name in linears if _is_matrix(block, name)}
    for q in tall:
        for k in tall:
            fits = tall[q] == heads.queries * heads.width and tall[k] == heads.keys * heads.width
            if fits and q != k and path.source not in (q, k):
                yield (
                    _linear_side(block, q, torch.arange(tall[q]).view(-1, heads.width)),
                    _linear_side(block, k, torch.arange(tall[k]).view(-1, heads.width)),
                )
    fused = _fused_rows(path, heads, linear_weight(block.get_submodule(path.source)).shape[0])
    if fused is not None:
        yield _linear_side(block, path.source, fused[0]), _linear_side(block, path.source, fused[1])


def _is_matrix(block: nn.Module, name: str) -> bool:
    weight = block.get_submodule(name)._parameters.get("weight")
    return weight is not None and weight.ndim == 2


def _norm_side(block: nn.Module, found: Trace, name: str, count: int, heads: Heads) -> _Side | None:
    """A norm of one head, which all heads share, or of all of them."""
    width = len(block.get_parameter(f"{name}.weight"))
    if width not in (heads.width, count * heads.width):
        return None
    own = (f"{name}.weight", f"{name}.bias") if found.norms[name].bias else (f"{name}.weight",)
    return _Side(own, found.norms[name].offset, width, torch.arange(width).view(-1, heads.width))


def _linear_side(block: nn.Module, name: str, places: Tensor) -> _Side:
    module = block.get_submodule(name)
    own = (f"{name}.weight",) if module._parameters.get("bias") is None else (f"{name}.weight", f"{name}.bias")
    return _Side(own, 0.0, linear_weight(module).shape[0], places)


def _fused_rows(path: ChannelPath, heads: Heads, height: int) -> tuple[Tensor, Tensor] | None:
    """Rows of queries and keys in a linear that gives the values as well: before every run of value rows lie its
    queries, then its keys (all in one run, or head by head)."""
    values = torch.unique(path.index)
    if height == len(values):
        return None
    starts = [int(v) for v in values if not bool((values == v - 1).any())]
    per_key = heads.queries // heads.keys
    queries, keys, position = [], [], 0
    for start in starts:
        run = 0
        while bool((values == start + run).any()):
            run += 1
        members = run // heads.width
        middle = position + members * per_key * heads.width
        if members * heads.width != run or start != middle + run:
            return None
        queries.append(torch.arange(position, middle).view(-1, heads.width))
        keys.append(torch.arange(middle, start).view(-1, heads.width))
        position = start + run
    return torch.cat(queries), torch.cat(keys)
