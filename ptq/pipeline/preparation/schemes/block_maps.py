"""The input groups of every kind of block, found by running the first block of each kind on a few dummy tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from calib.checkpoint.reader import ModelSource
from calib.model.input_groups import InputGroup
from calib.model.structure import find_linears
from calib.precision import strict_float32
from calib.runner.runner import CalibrationRunner

__all__ = ["BlockKind", "block_kind", "trace_block_kinds"]

BlockKind = tuple[type, tuple[str, ...]]
"""Blocks of one kind have the same class and the same linears."""


def block_kind(block: nn.Module) -> BlockKind:
    """The kind of a block."""
    return type(block), tuple(find_linears(block))


def trace_block_kinds(
    source: ModelSource, device: torch.device, dtype: torch.dtype
) -> Mapping[BlockKind, tuple[InputGroup, ...]]:
    """The input groups of every kind of block, in the order of execution.

    Args:
        source: The model.
        device: Where blocks are run.
        dtype: Of the pass.

    Raises:
        ModelError: A block cannot be run.
    """
    found: dict[BlockKind, tuple[InputGroup, ...]] = {}
    with torch.no_grad(), strict_float32():
        runner = CalibrationRunner(source, None, device=device, dtype=dtype)
        left = {block_kind(source.skeleton.get_submodule(name)) for name in runner.block_names}
        for context in runner:
            kind = block_kind(context.block)
            if kind in left:
                found[kind] = runner.map_of(context).groups
                left.discard(kind)
            if not left:
                break
    return found
