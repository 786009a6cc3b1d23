"""Experts in a GGUF file: those of a layer are one tensor ``[experts, out, in]`` for each of gate, up and down."""

from __future__ import annotations

import re
from typing import Any

from gguf import GGMLQuantizationType, GGUFWriter

from ptq.errors import UsageError

__all__ = ["Stacks", "add_experts", "expert_count", "one_kind", "stack_of"]

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def stack_of(name: str) -> tuple[str, int] | None:
    """The name of the stack that an expert's linear belongs to, and its place in it; ``None`` for other linears."""
    found = _EXPERT.search(name)
    return None if found is None else (_EXPERT.sub(".experts.", name), int(found[1]))


def expert_count(config: Any) -> int:
    """Experts of a layer; 0 for a model without."""
    return int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)


class Stacks:
    """Experts that come one after another, until all of a stack are there.

    Args:
        count: experts of a stack.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._parts: dict[str, dict[int, Any]] = {}

    def add(self, stack: str, number: int, part: Any) -> list[Any] | None:
        """Take one expert; returns those of its stack, in order, once it is complete."""
        parts = self._parts.setdefault(stack, {})
        parts[number] = part
        if len(parts) < self._count:
            return None
        del self._parts[stack]
        return [parts[place] for place in sorted(parts)]

    def check_complete(self) -> None:
        """Check that no expert is left over.

        Raises:
            UsageError: one is; names its stack.
        """
        for stack, parts in self._parts.items():
            raise UsageError(
                f"{stack}: {len(parts)} of {self._count} experts are quantized, and a GGUF file has all of a layer "
                "in one tensor of one type: quantize all of them, or write a dequantized folder (--format f16)."
            )


def one_kind(stack: str, kinds: list[GGMLQuantizationType]) -> GGMLQuantizationType:
    """The one type of a stack.

    Raises:
        UsageError: there are several.
    """
    found = sorted({kind.name: kind for kind in kinds}.items())
    if len(found) > 1:
        raise UsageError(
            f"{stack}: its experts would be {' and '.join(name for name, _ in found)}, and a GGUF file has all of a "
            "layer in one tensor of one type: give them one scheme."
        )
    return found[0][1]


def add_experts(writer: GGUFWriter, config: Any, *, normalized: bool) -> None:
    """Add how many experts there are, how many a token gets, and their sizes.

    Args:
        writer: of the file.
        config: the text config of transformers.
        normalized: whether llama.cpp makes the weights of the chosen experts sum to 1.

    Raises:
        UsageError: layers without experts, or weights that are not what llama.cpp makes of them.
    """
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise UsageError("llama.cpp has experts in every layer of this architecture, and this model has not.")
    if getattr(config, "norm_topk_prob", normalized) != normalized:
        raise UsageError(
            f"this model has norm_topk_prob={config.norm_topk_prob}, and llama.cpp runs this architecture with "
            f"{normalized}: write a dequantized folder (--format f16)."
        )
    writer.add_expert_count(expert_count(config))
    writer.add_expert_used_count(int(config.num_experts_per_tok))
    for key, add in (
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if getattr(config, key, None):
            add(int(getattr(config, key)))
