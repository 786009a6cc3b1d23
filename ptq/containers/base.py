"""The seam of checkpoint containers: how packed linears are named, stored and described in ``config.json``."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptq.quantized import QuantizedWeight
from ptq.scheme import KeyValueScheme, Scheme

__all__ = ["Container"]


class Container(abc.ABC):
    """One way of storing a quantized model, without state; the table is `ptq.containers.select.CONTAINERS`."""

    name: ClassVar[str]
    """What users type, e.g. ``"native"``."""
    quant_method: ClassVar[str]
    """The value of ``quant_method`` in ``config.json``, by which readers choose their code."""

    @abc.abstractmethod
    def unsupported_reason(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        model: nn.Module,
        key_values: KeyValueScheme | None,
    ) -> str | None:
        """Why readers of this container would not compute the same model; ``None`` where they do.

        Args:
            schemes: the scheme of every linear by full name, ``None`` for full precision.
            linears: the modules by the same names, in the dtype that ``config.json`` will name (the meta device is
                fine).
            model: the skeleton.
            key_values: how keys and values are rounded at run time.
        """

    def layer_tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that store linear ``name``, by full name, on the CPU."""
        return weight.tensors(name)

    def read_layer(
        self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedWeight:
        """The inverse of `layer_tensors`.

        Args:
            name: the linear's full name.
            tensors: by full name; others are not looked at.
            scheme: how the weight is stored.
            shape: ``(out_features, in_features)``.

        Raises:
            OutputError: the tensors are not what ``scheme`` says.
        """
        bare = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        return QuantizedWeight.from_tensors(bare, scheme, shape, where=name)

    @abc.abstractmethod
    def quantization_config(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        *,
        key_values: KeyValueScheme | None = None,
        others: Iterable[str] = (),
    ) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``.

        Args:
            schemes: the scheme of every linear by full name; ``None`` (or no entry) stays in full precision.
            linears: every linear of the model by full name, the head included.
            key_values: how keys and values are rounded at run time; ``None`` leaves them as they are.
            others: names of more modules in full precision, which the model as we build it does not have.
        """

    def config_entries(self) -> dict[str, Any]:
        """More entries of ``config.json``."""
        return {}

    def config_changes(self, dtype: torch.dtype) -> dict[str, Any]:
        """Entries of ``config.json`` that this container has otherwise than the source model.

        Args:
            dtype: of the source model.
        """
        return {}

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """More JSON files beside the weights, by name."""
        return {}
