"""The seam of number formats: everything that depends on *how numbers are represented*, behind one record per format.

A format says which schemes it takes, fits its parameters (scales, zero points, multipliers, exponents) to a weight,
gives solvers the grid that follows from them, and stores codes and parameters as tensors. Nothing else in the toolkit
knows how a code becomes a value: packing, sizes, the forecast, checkpoint containers, `QuantLinear` and reports ask
the record.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptq.errors import UsageError
from ptq.grids import ScaledGrid, ScaleSearch
from ptq.grids.storage import Storage

__all__ = ["NumberFormat", "TensorSpec", "check_fields", "join_groups", "ragged_reason", "stored_bits"]

TensorSpec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one stored tensor."""


class NumberFormat(abc.ABC):
    """One row of the table of number formats; instances are stateless and immutable.

    Where a method takes ``params``, these are the format's parameters of one weight by name, *exactly as stored*.
    Parameters of two dimensions are ``[out, n]`` with columns that belong to consecutive input channels, so that the
    parameters of neighbouring groups can be concatenated; all others belong to the whole weight.
    """

    name: str
    """What users type, e.g. ``"fp4"``."""
    summary: str
    """One line for ``ptq methods``."""
    defaults: Mapping[str, Any]
    """Fields of `ptq.Scheme` that a user gets who names only the format."""
    searches: tuple[str, ...] = ("minmax", "pnorm", "hessian")
    """Values of a method's option ``scales`` that `fit` takes."""
    fixed_groups: bool = False
    """Whether ``group_size`` belongs to the format, so that a single group is no weight of its own."""

    @property
    def fallback(self) -> Mapping[str, Any]:
        """Fields of the scheme that a weight gets which the format refuses for its shape; none refuses the model."""
        return {}

    columns: int = 1
    """Consecutive input channels of a row that one code stands for (more than 1: vector codebooks)."""

    @abc.abstractmethod
    def check(self, scheme: Storage) -> None:
        """Check a scheme of this format.

        Raises:
            UsageError: a field has a value that the format does not take; says which it takes.
        """

    def unsupported_reason(self, out_features: int, in_features: int, scheme: Storage) -> str | None:
        """Why a weight of this shape cannot be stored as ``scheme``; ``None`` where it can."""
        return None

    @abc.abstractmethod
    def describe(self, scheme: Storage) -> str:
        """The short name of the weight's storage for tables and logs, e.g. ``"int3 sym g64"`` or ``"fp4 g32"``."""

    @abc.abstractmethod
    def payload_bits(self, out_features: int, in_features: int, scheme: Storage) -> int:
        """Real bits of one weight: codes and all parameters, without the padding of words."""

    @abc.abstractmethod
    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor that stores a weight, by its name inside the module (``weight_packed``)."""

    def share(self, targets: Iterable[Tensor], scheme: Storage) -> Mapping[str, Tensor]:
        """Parameters that linears with one input must have in common (q/k/v, gate/up, experts); none by default.

        Args:
            targets: the weights ``[out, in]`` of the group, float32; made one at a time.
            scheme: of all of them.
        """
        return {}

    @abc.abstractmethod
    def fit(
        self,
        target: Tensor,
        scheme: Storage,
        search: ScaleSearch = "pnorm",
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Fit the parameters to ``target``.

        Args:
            target: float32 ``[out, in]``; not changed.
            scheme: of this format.
            search: how ranges are chosen.
            importance: ``[in]``, weight of each input channel's squared error (the Hessian's diagonal), for ``search``
                ``"hessian"``.
            shared: what `share` gave for the group; ``None`` computes it from ``target`` alone.

        Returns:
            The parameters exactly as they will be stored.

        Raises:
            NumericalError: ``target`` holds NaN or infinity.
        """

    @abc.abstractmethod
    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        """The grid of a weight with these parameters, on their device."""

    def scale_groups(self, scheme: Storage, in_features: int) -> Tensor | None:
        """The scale of every input channel, int64 ``[in_features]``, ascending, of formats whose scales can be refitted
        to given codes: the parameter ``scale`` ``[out, n]`` multiplies the values of its channels, and any number of
        its dtype will do. ``None`` (the default) where that is not so.
        """
        return None

    @abc.abstractmethod
    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        """The tensors of `tensor_specs`, contiguous, on the device of ``codes``.

        Raises:
            ValueError: codes or parameters that do not fit the scheme.
        """

    @abc.abstractmethod
    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The inverse of `pack`: codes and parameters."""

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], scheme: Storage, rows: slice, out_features: int, in_features: int
    ) -> Tensor:
        """Values of some output rows, float32 ``[rows, in]``, from the stored tensors.

        The default unpacks everything; formats that are run override it to touch only those rows.
        """
        codes, params = self.unpack(tensors, scheme, out_features, in_features)
        return self.grid(params, scheme, in_features).dequantize(codes)[rows]


def join_groups(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The parameters of a weight from those of its neighbouring groups of input channels, in their order.

    Matrices are concatenated; all others belong to the whole weight and are the first part's.
    """
    first = parts[0]
    return {
        name: torch.cat([part[name] for part in parts], 1) if value.ndim == 2 else value
        for name, value in first.items()
    }


def stored_bits(specs: Mapping[str, TensorSpec]) -> int:
    """The bits of all tensors of a format that stores nothing but its payload."""
    return sum(8 * math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())


def check_fields(name: str, scheme: Storage, wanted: Mapping[str, object], other: str | None = None) -> None:
    """Check the fields of a scheme that a number format leaves no choice for.

    Args:
        name: of the format.
        scheme: what was asked for.
        wanted: its fields by name.
        other: what takes other values, for the message.

    Raises:
        UsageError: a field has another value.
    """
    for field, value in wanted.items():
        found = getattr(scheme, field)
        if found != value:
            instead = "" if other is None else f", or take {other}"
            raise UsageError(f"the number format {name} has {field}={value}, got {found!r}: leave it out{instead}.")


def ragged_reason(name: str, block: int, in_features: int) -> str | None:
    """Why rows of ``in_features`` are not stored in whole blocks of a format; ``None`` where they are."""
    if in_features % block == 0:
        return None
    return f"it has {in_features} input channels, and blocks of {name} are {block} wide"
