"""The seam of kernels: which code multiplies a packed weight, chosen among records that say what they support.

A `Kernel` names the device types, dtypes and number formats that it serves and may refuse a shape. `choose` takes the
first record of `KERNELS` that serves a layer; the last one, `REFERENCE`, serves everything. ``PTQ_KERNEL=NAME`` in the
environment forces one, for those who debug.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq.errors import UsageError, unknown_name
from ptq.scheme import Scheme

__all__ = [
    "KERNELS",
    "REFERENCE",
    "TILE_WEIGHTS",
    "Kernel",
    "MergeRules",
    "Merged",
    "PackedWeight",
    "choose",
    "dequantized_tiles",
]

TILE_WEIGHTS = 2**22
"""Weights dequantized at a time by the reference: at most 28 MB of temporaries (1 byte per code, 4 per float32 value, 2
per half-precision value), while a tile is still large enough for an efficient matrix product."""


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight as its checkpoint stores it.

    Args:
        tensors: by bare name, as `ptq.number_formats.NumberFormat.tensor_specs` says.
        scheme: the number format and its layout.
        out_features: rows of the weight.
        in_features: columns of the weight.
        prepared: what the kernel's `Kernel.prepare` made of it.
        rotated: the input that goes with it was rotated as the scheme says.
    """

    tensors: Mapping[str, Tensor]
    scheme: Scheme
    out_features: int
    in_features: int
    prepared: Any = None
    rotated: bool = True


@dataclasses.dataclass(frozen=True)
class Merged:
    """A member of a merged weight.

    Args:
        weight: its own, whose prepared tensors are views of the merged ones.
        start: its first row among those of the merged weight.
    """

    weight: PackedWeight
    start: int


@dataclasses.dataclass(frozen=True)
class MergeRules:
    """How prepared weights that multiply the same input become one.

    Args:
        key: only weights with equal keys can be merged.
        merge: to one weight, and its members in order.
        most_vectors: inputs up to which one product is faster than several.
    """

    key: Callable[[PackedWeight], Hashable]
    merge: Callable[[Sequence[PackedWeight]], tuple[PackedWeight, list[Merged]]]
    most_vectors: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to compute ``y = x W^T + bias``.

    Args:
        name: what ``PTQ_KERNEL`` takes.
        devices: device types served; empty serves all.
        dtypes: of activations; empty serves all.
        formats: names of number formats; empty serves all.
        unsupported_reason: why a weight of a served format cannot be multiplied (its shape, its group size, a missing
            compiler), or ``None``.
        product: ``(x [..., in_features] after the input transform, weight, bias or None) -> [..., out_features]``, in
            the dtype of ``x``.
        rounds_input: ``product`` takes the input before it is rounded (but rotated) and rounds it itself, as the
            scheme's activation format says.
        prepare: made of a layer's weight once, for a kernel that reads it in an order of its own; comes back as
            `PackedWeight.prepared`.
        rotates_input: ``product`` takes the input before it is rotated where `PackedWeight.rotated` is false.
        multiplies: how, in a few words for people.
        restore: the stored tensors that `PackedWeight.prepared` holds in another order, bit for bit: a layer then
            keeps these alone.
        merging: how prepared weights are merged; ``None`` if they are not.
        scale_dtypes: of stored scales; empty serves all.
    """

    name: str
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    formats: frozenset[str]
    unsupported_reason: Callable[[Scheme, int, int], str | None]
    product: Callable[[Tensor, PackedWeight, Tensor | None], Tensor]
    rounds_input: bool = False
    prepare: Callable[[PackedWeight], Any] | None = None
    rotates_input: bool = False
    multiplies: str = ""
    restore: Callable[[PackedWeight], Mapping[str, Tensor]] | None = None
    merging: MergeRules | None = None
    scale_dtypes: frozenset[torch.dtype] = frozenset()

    def refusal(
        self, device: str, dtype: torch.dtype, scheme: Scheme, out_features: int, in_features: int
    ) -> str | None:
        """Why this kernel does not serve a layer; ``None`` where it does."""
        if self.devices and device not in self.devices:
            return f"it runs on {', '.join(sorted(self.devices))} and not on {device}"
        if self.dtypes and dtype not in self.dtypes:
            return f"it does not multiply {dtype}"
        if self.formats and scheme.format not in self.formats:
            return f"it does not read the number format {scheme.format}"
        return self.unsupported_reason(scheme, out_features, in_features)


def dequantized_tiles(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of output rows with their weights ``[rows, in_features]``, dequantized in float32, cast to ``dtype``."""
    step, record = max(1, TILE_WEIGHTS // weight.in_features), weight.scheme.number_format
    for start in range(0, weight.out_features, step):
        rows = slice(start, min(start + step, weight.out_features))
        values = record.dequantize_rows(weight.tensors, weight.scheme, rows, weight.out_features, weight.in_features)
        yield rows, values.to(dtype)


def _reference(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    parts = [
        functional.linear(x, tile, None if bias is None else bias[rows])
        for rows, tile in dequantized_tiles(weight, x.dtype)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _serves_all(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    return None


REFERENCE = Kernel(
    "reference", frozenset(), frozenset(), frozenset(), _serves_all, _reference, multiplies="dequantized tiles"
)
"""Unpacks a tile of rows, dequantizes it in float32, casts it to the activations' dtype and multiplies."""
KERNELS: list[Kernel] = [REFERENCE]
"""The table, fastest first. A kernel joins by a record in front of `REFERENCE`."""


def choose(device: str, dtype: torch.dtype, scheme: Scheme, out_features: int, in_features: int) -> Kernel:
    """The kernel of a layer.

    Raises:
        UsageError: ``PTQ_KERNEL`` names an unknown kernel, or one that does not serve the layer.
    """
    return _choose(os.environ.get("PTQ_KERNEL", ""), tuple(KERNELS), device, dtype, scheme, out_features, in_features)


@functools.lru_cache(maxsize=1024)
def _choose(
    forced: str,
    kernels: tuple[Kernel, ...],
    device: str,
    dtype: torch.dtype,
    scheme: Scheme,
    out_features: int,
    in_features: int,
) -> Kernel:
    layer = (device, dtype, scheme, out_features, in_features)
    if not forced:
        return next(kernel for kernel in kernels if kernel.refusal(*layer) is None)
    named = {kernel.name: kernel for kernel in kernels}
    if forced not in named:
        raise unknown_name("kernel in the environment variable PTQ_KERNEL", forced, named)
    reason = named[forced].refusal(*layer)
    if reason is not None:
        raise UsageError(
            f"PTQ_KERNEL={forced} cannot multiply {scheme.describe()} of {out_features} x {in_features}: {reason}. "
            "Unset it, or take 'reference'."
        )
    return named[forced]
