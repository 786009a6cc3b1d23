"""Which linears share a format, and which formats limits allow."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from calib.checkpoint.reader import ModelSource
from calib.model.experts import expert_lists
from calib.precision import strict_float32
from calib.runner.runner import CalibrationRunner
from ptq.allocation.problem.candidates import Candidate
from ptq.allocation.problem.items import Item, Linear
from ptq.errors import UsageError

__all__ = ["Limit", "allowed_formats", "group_linears", "parse_limit"]

_COMPARISONS: dict[str, Callable[[int, int], bool]] = {">=": operator.ge, "<=": operator.le, "=": operator.eq}


class Limit(NamedTuple):
    """A condition on the bits of linears that match a pattern, e.g. ``*.down_proj>=4``."""

    pattern: str
    comparison: str
    bits: int

    def __str__(self) -> str:
        return f"{self.pattern}{self.comparison}{self.bits}"


def parse_limit(text: str) -> Limit:
    """``PATTERN>=BITS``, ``PATTERN<=BITS`` or ``PATTERN=BITS``.

    Raises:
        UsageError: another form.
    """
    match = re.fullmatch(r"\s*(\S+?)\s*(>=|<=|=)\s*(\d+)\s*", text)
    if match is None:
        raise UsageError(
            f"a limit is PATTERN>=BITS, PATTERN<=BITS or PATTERN=BITS, e.g. '*.down_proj>=4'; got {text!r}."
        )
    return Limit(match[1], match[2], int(match[3]))


def allowed_formats(
    items: Sequence[Item], candidates: Sequence[Candidate], limits: Sequence[Limit]
) -> NDArray[np.bool_]:
    """Which candidates every item may have, bool ``[items, candidates]``.

    Raises:
        UsageError: a limit matches no linear, or limits leave a linear no candidate.
    """
    allowed = np.ones((len(items), len(candidates)), dtype=bool)
    names = [one.name for item in items for one in item.linears]
    for limit in limits:
        if not any(fnmatch.fnmatchcase(name, limit.pattern) for name in names):
            raise UsageError(
                f"the limit {limit} matches no linear that a format is chosen for. Names look like {names[0]}; the "
                f"embedding and the head are among them only with --include."
            )
    for row, item in enumerate(items):
        hits = [x for x in limits if any(fnmatch.fnmatchcase(one.name, x.pattern) for one in item.linears)]
        for column, candidate in enumerate(candidates):
            allowed[row, column] = all(_COMPARISONS[x.comparison](candidate.bits, x.bits) for x in hits)
        if not allowed[row].any():
            labels = ", ".join(candidate.label for candidate in candidates)
            raise UsageError(
                f"the limits {' and '.join(map(str, hits))} leave {item.name} no format of the candidates {labels}: "
                f"change a limit or add a candidate."
            )
    return allowed


def group_linears(source: ModelSource, linears: Sequence[Linear], *, fused: bool) -> tuple[Item, ...]:
    """Linears as items: all experts of a block are one; with ``fused`` also what one kernel computes in runtimes such
    as vLLM (q, k and v; gate and up).

    Args:
        source: the model.
        linears: in the model's order.
        fused: whether the target runtime fuses linears with a common input.

    Raises:
        ModelError: the model's blocks cannot be run, which is how common inputs are found.
    """
    keys: dict[str, str] = {}
    for name in expert_lists(source.skeleton):
        keys |= {one.name: name for one in linears if one.name.startswith(f"{name}.")}
    if fused:
        keys = _fused(source) | keys
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(keys.get(linear.name, linear.name), []).append(linear)
    return tuple(Item(tuple(group)) for group in groups.values())


def _fused(source: ModelSource) -> dict[str, str]:
    """By linear that shares its input with others of its module, the name of the first of them."""
    keys: dict[str, str] = {}
    with torch.no_grad(), strict_float32():
        for block in CalibrationRunner(source, None, device=torch.device("cpu"), dtype=torch.float32):
            for group in block.runner.map_of(block).groups:
                first: dict[str, str] = {}
                for name in group.linears:
                    owner = first.setdefault(name.rpartition(".")[0], name)
                    keys[f"{block.name}.{name}"] = f"{block.name}.{owner}"
    return keys
