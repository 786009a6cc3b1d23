"""`QuantizedWeight`: what every method returns, every container stores and the runtime computes with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.errors import OutputError
from ptq.grids import ScaledGrid
from ptq.scheme import Scheme

__all__ = ["QuantizedWeight"]


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """One linear's weight ``[out, in]`` as codes and the parameters of its number format.

    Args:
        codes: uint8 ``[out, in]``, one code per byte (packing belongs to the number format).
        params: the format's parameters by name, exactly the values that will be stored: for integers ``scale``
            ``[out, groups]`` in the scheme's ``scale_dtype`` and, if asymmetric, ``zero`` uint8 ``[out, groups]``.
        scheme: the number format and its layout, and how the input is rounded.
        input_params: the parameters of the input's format by the names they are stored under, for formats that keep
            some from calibration (`ptq.activation_formats.ActivationFormat.tensor_specs`).
    """

    codes: Tensor
    params: Mapping[str, Tensor]
    scheme: Scheme
    input_params: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_grid(cls, codes: Tensor, grid: ScaledGrid, scheme: Scheme) -> QuantizedWeight:
        """A weight from codes and the grid they were rounded onto.

        Raises:
            ValueError: the grid is not the one that ``scheme`` describes, so that the stored codes would be read as
                other values.
        """
        stored = scheme.number_format.grid(grid.params, scheme, codes.shape[1]) if grid.params else None
        if stored is None or not torch.equal(stored.grid.levels, grid.grid.levels.to(stored.grid.levels)):
            kind = "equal steps" if grid.grid.uniform else "unequal levels"
            raise ValueError(
                f"codes of a grid of {len(grid.grid.levels)} {kind} cannot be stored as {scheme.describe()}: its "
                "parameters are not those of the scheme's number format."
            )
        return cls(codes, grid.params, scheme)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], where: str = ""
    ) -> QuantizedWeight:
        """The inverse of `tensors`.

        Args:
            tensors: by bare name (``weight_packed``); others are not looked at.
            scheme: how the weight is stored.
            shape: ``(out_features, in_features)``.
            where: the linear's full name, for errors.

        Raises:
            OutputError: a tensor is missing or has another shape, dtype or content than ``scheme`` says.
        """
        prefix, (out_features, in_features) = f"{where}." if where else "", shape
        inputs = scheme.input_specs(in_features)
        specs = scheme.number_format.tensor_specs(out_features, in_features, scheme) | inputs
        for key, (size, dtype) in specs.items():
            tensor = tensors.get(key)
            if tensor is None or tuple(tensor.shape) != size or tensor.dtype != dtype:
                found = "missing" if tensor is None else _show(tensor)
                raise OutputError(
                    f"{prefix}{key} is {found}, but {scheme.describe()} of {out_features} x {in_features} needs "
                    f"{dtype} {list(size)}: the checkpoint is damaged or its config was edited; quantize again."
                )
        said = tensors.get("weight_shape")
        if said is not None and not said.is_meta and tuple(said.tolist()) != shape:
            raise OutputError(
                f"{prefix}weight_shape says {said.tolist()}, but the linear is {out_features} x {in_features}: the "
                "checkpoint is damaged, quantize again."
            )
        try:
            codes, params = scheme.number_format.unpack(tensors, scheme, out_features, in_features)
        except ValueError as error:
            raise OutputError(f"{prefix}weight: {error}; the checkpoint is damaged, quantize again.") from error
        return cls(codes, params, scheme, {key: tensors[key] for key in inputs})

    def tensors(self, name: str = "") -> dict[str, Tensor]:
        """The tensors to store, on the CPU, contiguous: by full name for linear ``name``, else by bare names.

        Raises:
            ValueError: the parameters do not fit the scheme.
        """
        scheme, prefix = self.scheme, f"{name}." if name else ""
        try:
            tensors = scheme.number_format.pack(self.codes, self.params, scheme)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from error
        tensors = tensors | dict(self.input_params)
        specs = scheme.number_format.tensor_specs(*self.shape, scheme) | scheme.input_specs(self.shape[1])
        if tensors.keys() != specs.keys():
            raise ValueError(f"{name}: {scheme.describe()} stores {sorted(specs)}, got {sorted(tensors)}")
        for key, (shape, dtype) in specs.items():
            if tuple(tensors[key].shape) != shape or tensors[key].dtype != dtype:
                wrong = f"{_show(tensors[key])}, {scheme.describe()} needs {dtype} {list(shape)}"
                raise ValueError(f"{prefix}{key} is {wrong}")
        return {prefix + key: tensor.cpu().contiguous() for key, tensor in tensors.items()}

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.codes.shape[0], self.codes.shape[1] * self.scheme.number_format.columns

    def scaled_grid(self) -> ScaledGrid:
        """The grid with this weight's scales, in float32."""
        return self.scheme.number_format.grid(self.params, self.scheme, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[out, in]`` that the runtime multiplies with: computed in float32, then cast to ``dtype``."""
        return self.scaled_grid().dequantize(self.codes).to(dtype)

    @property
    def payload_bytes(self) -> int:
        """Bytes of codes and parameters without padding to words: the real size of this weight."""
        return (self.scheme.number_format.payload_bits(*self.shape, self.scheme) + 7) // 8

    @property
    def bits_per_weight(self) -> float:
        """Real bits per weight: codes and parameters together."""
        out_features, in_features = self.shape
        return 8 * self.payload_bytes / (out_features * in_features)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        params = {name: tensor.to(device) for name, tensor in self.params.items()}
        inputs = {name: tensor.to(device) for name, tensor in self.input_params.items()}
        return dataclasses.replace(self, codes=self.codes.to(device), params=params, input_params=inputs)


def _show(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
