"""Sizes of an output, exactly, before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from calib.checkpoint.reader import ModelSource
from calib.model.structure import linear_weight
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan
from ptq.report import KeptTensor, PartRecord

__all__ = ["FUSED_EXPERTS", "NOT_IN_MODEL", "Sizes", "dense_experts", "model_tensor", "plan_sizes"]

FUSED_EXPERTS = "fused experts of a kind that cannot be taken apart"  # why a tensor is kept
NOT_IN_MODEL = "no part of the model"  # likewise


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What follows from shapes and schemes.

    Args:
        quantized: parameters; linears: how many.
        payload: bytes of codes, scales and zeros; packed: of the tensors that hold them.
        kept: tensors that stay in full precision, the largest first; kept_parameters: how many numbers.
    """

    quantized: int
    payload: int
    packed: int
    linears: int
    kept: tuple[KeptTensor, ...]
    kept_parameters: int

    @property
    def kept_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.kept)

    @property
    def file_bytes(self) -> int:
        """Bytes of all weight files, without their headers."""
        return self.packed + self.kept_bytes


def plan_sizes(source: ModelSource, plan: Plan, label: Callable[[str, int], tuple[str, str]]) -> Sizes:
    """Bytes of an output before anything is computed.

    Args:
        source: the model; plan: what will be done to it.
        label: name and dimensions of a tensor that stays -> the name it is listed under, and why it stays.
    """
    model = source.skeleton
    quantized = payload = packed = linears = 0
    taken = set()
    for name, scheme in (*plan.schemes.items(), *plan.outside.items()):
        if scheme is None:
            continue
        rows, columns = linear_weight(model.get_submodule(name)).shape
        quantized, linears = quantized + rows * columns, linears + 1
        payload += (scheme.number_format.payload_bits(rows, columns, scheme) + 7) // 8
        specs = scheme.number_format.tensor_specs(rows, columns, scheme) | scheme.input_specs(columns)
        packed += sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
        taken.add(f"{name}.weight")
    part = PartRecord()
    for name, shape, size in source.stored_sizes(source.tensor_names() - taken):
        part.keep(*label(name, len(shape)), math.prod(shape), size)
    for name, tensor in source.carried().items():
        part.keep(name, NOT_IN_MODEL, math.prod(tensor.shape), tensor.nbytes)
    kept = tuple(sorted(part.kept.values(), key=lambda tensor: -tensor.bytes))
    return Sizes(quantized, payload, packed, linears, kept, part.kept_parameters)


def dense_experts(kept: Iterable[KeptTensor], payload: int) -> list[str]:
    """A sentence about experts among ``kept``, with their share beside ``payload`` bytes of quantized linears."""
    experts = sum(tensor.bytes for tensor in kept if tensor.reason == FUSED_EXPERTS)
    if not experts:
        return []
    share = experts / (experts + payload)
    return [f"experts fused in one tensor stay in full precision: {share:.0%} of the blocks' bytes"]


def model_tensor(model: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of the skeleton by its full name."""
    module, _, leaf = name.rpartition(".")
    part = model.get_submodule(module)
    return part._parameters.get(leaf) if leaf in part._parameters else part._buffers.get(leaf)
