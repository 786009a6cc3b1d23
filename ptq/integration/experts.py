"""Experts in checkpoints of packed weights: one linear an expert, where transformers builds fused modules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter

from calib.model.experts import expert_lists, split_experts

__all__ = ["leave_split_experts", "split_named_experts"]

_EXPERT_TENSOR = re.compile(r"(?P<experts>.+)\.\d+\.(gate|up|down)_proj\.\w+")


def split_named_experts(model: nn.Module, linears: Iterable[str]) -> None:
    """Split those fused experts of a skeleton that these linears belong to, by names such as ``experts.3.up_proj``."""
    modules = dict(model.named_modules())
    owners = {name.rsplit(".", 2)[0] for name in linears if name not in modules and name.count(".") >= 2}
    split_experts(model, owners)


def leave_split_experts(conversions: list[Any], model: Any) -> list[Any]:
    """The conversions with those that merge experts taught to leave the tensors of split experts alone."""
    split = frozenset(expert_lists(model))
    if not split:
        return conversions
    prefix = f"{model.base_model_prefix}."
    known = split | {name.removeprefix(prefix) for name in split} | {prefix + name for name in split}
    return [_MergeOthers.like(c, known) if type(c) is WeightConverter else c for c in conversions]


class _MergeOthers(WeightConverter):
    """A converter that does not see the tensors of split experts, which are stored as they are loaded."""

    __slots__ = ("split",)

    @classmethod
    def like(cls, converter: Any, split: frozenset[str]) -> _MergeOthers:
        new = cls(
            list(converter._original_source_patterns),
            list(converter._original_target_patterns),
            converter.operations,
            converter.force_cpu,
        )
        new.scope_prefix, new.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        new.split = split
        return new

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        found = _EXPERT_TENSOR.fullmatch(source_key)
        if found is not None and found["experts"] in getattr(self, "split", ()):
            return source_key, None
        result: tuple[str, str | None] = super().rename_source_key(source_key)
        return result
