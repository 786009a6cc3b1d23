"""The same codes and scales in another container."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ptq.containers.native import NATIVE, with_residual_rotation
from ptq.containers.select import CONTAINERS, select_container
from ptq.export.one_kernel import refuse_different_schemes
from ptq.export.result import Part, Result
from ptq.scheme import Scheme

__all__ = ["ContainerExport"]


class ContainerExport:
    """Every weight as another container stores it; not a bit of its codes and scales changes.

    Args:
        result: the quantized model.
        name: of the container.

    Raises:
        UsageError: it cannot carry the result; says what to change.
    """

    def __init__(self, result: Result, name: str) -> None:
        self._result = result
        schemes: dict[str, Scheme | None] = dict(result.schemes)
        chosen, self.reason = select_container(name, schemes, result.linears, result.skeleton, result.key_values)
        self.name, self._schemes, self._container = chosen, schemes, CONTAINERS[chosen]
        if self._container is not NATIVE:
            refuse_different_schemes(result.skeleton, result.linears, result.schemes)

    def notes(self) -> list[str]:
        """What a reader of the folder does not do: nothing."""
        return []

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """What one weight file of the result becomes."""
        tensors = dict(part.others)
        for name, weight in part.linears():
            tensors |= self._container.layer_tensors(name, weight)
        return tensors

    def config(self) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, dict[str, Any]]]:
        """``config.json``, its ``quantization_config``, and more files."""
        quantization = self._container.quantization_config(
            self._schemes, self._result.linears, key_values=self._result.key_values
        )
        if self._container is NATIVE:
            quantization = with_residual_rotation(quantization, self._result.residual_rotation)
        config = {**self._result.plain_config, **self._container.config_changes(self._result.dtype)}
        return config, quantization, self._container.files(quantization)
