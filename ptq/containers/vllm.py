"""What vLLM reads of a compressed-tensors checkpoint, as far as its loader's source says so. It was not run here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq.scheme import Scheme

__all__ = ["vllm_phrase", "vllm_problem"]

BITS = (4, 8)
GROUP_SIZES = (None, 32, 64, 128)
OUTPUT_MULTIPLE, INPUT_MULTIPLE = 64, 128


def vllm_problem(schemes: Mapping[str, Scheme | None], linears: Mapping[str, Any]) -> str | None:
    """What of a checkpoint is beyond vLLM's loader for packed integers (``CompressedTensorsWNA16``, Marlin).

    Later versions have kernels for more, e.g. for 2 to 8 bits.

    Args:
        schemes: of all linears in the blocks by full name, ``None`` for full precision.
        linears: the modules, ``torch.nn.Linear``.
    """
    for name, scheme in schemes.items():
        if scheme is None:
            continue
        if scheme.bits not in BITS:
            return f"{scheme.bits} bits; all read 4 and 8"
        if scheme.group_size not in GROUP_SIZES:
            return f"groups of {scheme.group_size}; all read 32, 64, 128 and whole channels"
        out_features, in_features = linears[name].out_features, linears[name].in_features
        if out_features % OUTPUT_MULTIPLE or in_features % INPUT_MULTIPLE:
            return f"{name} is {out_features} x {in_features}; all read multiples of 64 x 128"
    return None


def _is_packed_integer(scheme: Scheme) -> bool:
    """Whether a scheme is read by the loader that `vllm_problem` knows: integers, inputs as they are."""
    return scheme.format == "int" and not scheme.rounds_input


def vllm_phrase(schemes: Mapping[str, Scheme | None], linears: Mapping[str, Any]) -> str:
    """The half sentence on vLLM in a report's ``container_reason``."""
    names = {scheme.describe() for scheme in schemes.values() if scheme is not None and not _is_packed_integer(scheme)}
    if names:
        return f"vLLM has loaders of its own for {', '.join(sorted(names))}, which were not tried"
    problem = vllm_problem(schemes, linears)
    return (
        "vLLM reads these fields (not run here)"
        if problem is None
        else f"not every version of vLLM reads it ({problem})"
    )
