"""Which format an output is written in, and why, as far as rules say; `ptq.proof` then tries it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from calib.checkpoint.reader import unmerged_experts
from calib.model.experts import expert_linears
from calib.model.structure import find_blocks, fused_experts
from ptq.errors import UsageError
from ptq.formats import compressed_tensors
from ptq.scheme import SCALE_DTYPES, Scheme

__all__ = ["select_format"]


def select_format(
    requested: str,
    schemes: Mapping[str, Scheme | None],
    linears: Mapping[str, nn.Module],
    model: nn.Module,
    kv_bits: int | None = None,
) -> tuple[str, str]:
    """``("compressed-tensors" or "native", reason)`` for a recipe's ``format`` (``auto`` or one of the two).

    ``schemes`` and ``linears`` are by full name, as in `compressed_tensors.unsupported_reason`; ``model`` is the
    skeleton; ``kv_bits`` is the recipe's.

    Raises:
        UsageError: compressed-tensors was asked for and cannot carry the result.
    """
    if requested == "native":
        return "native", "asked for"
    problem = (
        _key_values(kv_bits)
        or _fused_experts(model)
        or compressed_tensors.unsupported_reason(schemes, linears)
        or _split_experts(schemes, model)
    )
    if problem is None:
        return "compressed-tensors", "it carries every scheme here"
    if requested == "auto":
        return "native", problem
    raise UsageError(f"the compressed-tensors format cannot carry this: {problem}. Use format 'native' or 'auto'.")


def _key_values(bits: int | None) -> str | None:
    return None if bits is None else f"keys and values are rounded to {bits} bits at run time, which only ptq does"


def _fused_experts(model: nn.Module) -> str | None:
    """Stock transformers (5.23) runs the format's decompression on experts as well, and fails where they are dense."""
    names = fused_experts(model)
    blocks = tuple(f"{block}." for block in find_blocks(model)) if names else ()
    for name in names:
        if name.startswith(blocks):  # a vision tower has tensors of three dimensions, too
            return f"{name} holds experts in full precision, which transformers cannot load beside packed weights"
    return None


def _split_experts(schemes: Mapping[str, Scheme | None], model: nn.Module) -> str | None:
    """Why stock transformers (5.23), which decompresses experts while it merges them, would not load these."""
    used = {scheme for scheme in schemes.values() if scheme is not None}
    for name, linear in expert_linears(model).items():
        scheme = schemes.get(name)
        if scheme is None:
            return f"{name} is in full precision, and transformers cannot load that beside packed experts"
        if len(used) > 1:
            return f"{name} is packed in one of {len(used)} schemes, and transformers knows one for all experts"
        dtype = linear.get_parameter("weight").dtype
        if dtype != SCALE_DTYPES[scheme.resolved(dtype).scale_dtype]:
            return f"{name} would get the dtype of its scales, {scheme.scale_dtype}, in transformers"
    stray = unmerged_experts(model)
    return None if stray is None else f"{stray} is a name under which transformers does not look for experts"
