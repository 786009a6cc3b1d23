"""Which channels of one linear's output arrive, one by one and in proportion, at another linear's input.

In a Llama block the values arrive at ``o_proj`` and ``up_proj``'s output arrives at ``down_proj``. Both are seen in the
same way: the rows of a linear's output are multiplied by known factors, and the input of a later linear shows by which
factor each of its columns has grown. Rows are numbered with two digits, a pass each, so that the factors lie far apart.

Attention averages over tokens with weights that queries and keys decide. Where these come from the same (fused) linear,
all tokens but the first, which sees only itself, are of no use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib.model.input_groups import first_argument
from calib.model.structure import is_linear, linear_weight
from ptq.transforms.tracing import Call, hooked

__all__ = ["ChannelPath", "find_paths", "head_width"]

_CLEAR = 0.05  # how near to a digit a factor must be
_DEAD = 1e-6  # of the largest entry: below it a column shows nothing


@dataclasses.dataclass(frozen=True)
class ChannelPath:
    """Rows of a linear's output that arrive at the columns of another one's input.

    Args:
        source: name of the first linear; target: of the second.
        index: int64 ``[in of the target]``, the source's row; -1 for a column that was always zero.
        mixes: tokens are mixed on the way (attention).
    """

    source: str
    target: str
    index: Tensor
    mixes: bool


def find_paths(
    root: nn.Module, run: Callable[[], Tensor], calls: Mapping[str, Call], shape: tuple[int, int]
) -> list[ChannelPath]:
    """All paths between the linears of a block.

    Args:
        root: the block with its weights, in float32; run: one pass through it.
        calls: of its linears, in order; shape: sequences and tokens of the pass.
    """
    names = [name for name, call in calls.items() if call.calls == 1 and is_linear(root.get_submodule(name))]
    probe = _Probe(root, run, shape)
    natural = {name: x for name in names if (x := probe.shaped(calls[name].input)) is not None}
    paths: list[ChannelPath] = []
    for place, source in enumerate(names):
        later = [name for name in names[place + 1 :] if name in natural]
        found: dict[str, Tensor] = {}
        for rows in _row_sets(root, source, later):
            found |= _match(probe, source, rows, {name: natural[name] for name in later if name not in found})
        for target, index in found.items():
            paths.append(ChannelPath(source, target, index, probe.mixes(source, target, natural[target])))
    return paths


def _row_sets(root: nn.Module, source: str, later: Sequence[str]) -> Iterator[Tensor]:
    """Rows to number: all; and, for a linear twice as tall as a later one is wide (gate and up in one), its halves."""
    rows = torch.arange(linear_weight(root.get_submodule(source)).shape[0])
    yield rows
    if any(2 * linear_weight(root.get_submodule(name)).shape[1] == len(rows) for name in later):
        half = len(rows) // 2
        yield from (rows[half:], rows[:half], rows[1::2], rows[::2])


class _Probe:
    """Passes through a block in which the output of one linear is changed."""

    def __init__(self, root: nn.Module, run: Callable[[], Tensor], shape: tuple[int, int]) -> None:
        self.root, self.run, self.shape = root, run, shape

    def shaped(self, tensor: Tensor) -> Tensor | None:
        """``[sequences, tokens, n]``; ``None`` if not all tokens are there."""
        if tensor[..., 0].numel() != math.prod(self.shape):
            return None
        return tensor.reshape(*self.shape, tensor.shape[-1])

    def inputs(self, source: str, change: Callable[[Tensor], Tensor], targets: Sequence[str]) -> dict[str, Tensor]:
        """Inputs of ``targets`` when the output ``[sequences, tokens, out]`` of ``source`` is changed."""
        seen: dict[str, Tensor] = {}

        def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if name != source:
                seen[name] = first_argument(args, kwargs).detach()
                return None
            shaped = self.shaped(output)
            return None if shaped is None else change(shaped).reshape(output.shape)

        with hooked({self.root.get_submodule(name): name for name in (source, *targets)}, note):
            self.run()
        return {name: x for name, tensor in seen.items() if (x := self.shaped(tensor)) is not None}

    def mixes(self, source: str, target: str, natural: Tensor) -> bool:
        """Whether the first token's output of ``source`` reaches another token's input of ``target``."""
        changed = self.inputs(source, _double_first, [target])[target]
        rest = (changed - natural)[:, 1:]
        return bool(rest.numel() and rest.abs().max() > _DEAD * natural.abs().max())


def _double_first(output: Tensor) -> Tensor:
    output = output.clone()
    output[:, 0] *= 2.0
    return output


def _match(probe: _Probe, source: str, rows: Tensor, natural: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For every target that the numbered rows reach in proportion: the row of each column."""
    base = math.isqrt(max(len(rows) - 1, 0)) + 1
    digits = (torch.arange(len(rows)) // base, torch.arange(len(rows)) % base)
    grown = []
    for digit in digits:
        # Not from one on: a column that nothing reaches must not look like the first row.
        numbered = 1.0 + (digit + 1) / base

        def change(output: Tensor, numbered: Tensor = numbered) -> Tensor:
            factor = torch.ones(output.shape[-1])
            factor[rows] = numbered
            return output * factor.to(output)

        grown.append(probe.inputs(source, change, list(natural)))
    found = {}
    for target, before in natural.items():
        if all(target in inputs for inputs in grown):
            index = _rows_of(before, [inputs[target] for inputs in grown], base, len(rows))
            if index is not None:
                found[target] = torch.where(index < 0, index, rows[index.clamp(min=0)])
    return found


def _rows_of(before: Tensor, grown: Sequence[Tensor], base: int, count: int) -> Tensor | None:
    """Numbers of the rows that the columns ``[sequences, tokens, n]`` come from; ``None`` if they do not."""
    for tokens in (slice(None), slice(0, 1)):  # all, or the first of every sequence
        index = torch.zeros(before.shape[-1], dtype=torch.int64)
        plain = before[:, tokens].flatten(0, 1)  # [t, n]
        peak, token = plain.abs().max(0)
        live = (peak > _DEAD * peak.max()).cpu()
        clear = live.clone()
        for changed in grown:
            ratio = changed[:, tokens].flatten(0, 1).gather(0, token[None])[0] / plain.gather(0, token[None])[0]
            number = ((ratio.double() - 1.0) * base - 1.0).nan_to_num(-1.0, -1.0, -1.0).cpu()
            digit = number.round()
            clear &= ((number - digit).abs() < _CLEAR) & (digit >= 0) & (digit < base)
            index = index * base + digit.long()
        clear &= index < count
        if bool(live.any()) and torch.equal(clear, live):
            return _filled(torch.where(live, index, -1), count)
    return None


def _filled(index: Tensor, count: int) -> Tensor:
    """Columns that were zero (a ReLU) have their rows where all others follow one after the other."""
    shift = (index - torch.arange(len(index)))[index >= 0]
    whole = torch.arange(len(index)) + shift[0]
    return whole if bool((shift == shift[0]).all()) and int(whole[0]) >= 0 and int(whole[-1]) < count else index


def head_width(root: nn.Module, run: Callable[[], Tensor], path: ChannelPath, shape: tuple[int, int]) -> int:
    """Columns of a head at the target of a path that mixes tokens.

    If every value is one at the first token and zero at all others, attention gives the weights that the first token
    has, the same for all columns of a head.
    """

    def mark_first(output: Tensor) -> Tensor:
        output = output.clone()
        rows = path.index[path.index >= 0].to(output.device)
        output[..., rows] = 0.0
        output[:, 0, rows] = 1.0
        return output

    weights = _Probe(root, run, shape).inputs(path.source, mark_first, [path.target])[path.target]
    steps = (weights[..., 1:] - weights[..., :-1]).abs().amax((0, 1))  # [n - 1]
    return math.gcd(weights.shape[-1], *((steps > 1e-5).nonzero().flatten() + 1).tolist())
