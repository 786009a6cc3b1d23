"""The seams. Of layer-wise methods: a frozen config, the statistics it needs, and a function on tensors.

A `LayerMethod` knows a weight, its statistics and a scheme. It does not know the model, the walk, the other layers, the
format the result is stored in, or who chose the scheme.

Of learned methods: a config alone. A `WindowMethod` says as data in which windows what is learned and how, and the
engine in `ptq.learning` does it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from calib.stats import LinearStatistics, Stat
from ptq.errors import UsageError, unknown_name
from ptq.grids import BoundGrid
from ptq.learning import LearnedConfig
from ptq.quantized import QuantizedWeight
from ptq.scheme import SCALE_DTYPES, Scheme

__all__ = ["LayerMethod", "LayerResult", "WindowMethod", "finish", "make_config", "parse_options"]


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """A quantized weight and what the method wants the record to say.

    ``flops`` are the floating-point operations of matrix products and factorizations; what linears share is counted by
    the one that made it. The search of scales and other elementwise work is not counted.
    """

    weight: QuantizedWeight
    alpha: float | None = None
    r2: float | None = None
    damping: float | None = None
    notes: tuple[str, ...] = ()
    flops: int = 0


@dataclasses.dataclass(frozen=True)
class LayerMethod:
    """One entry of the table of methods.

    Args:
        name: what users type.
        summary: one line for ``ptq methods``.
        config: frozen dataclass of the method's options, all with defaults, validated in ``__post_init__``.
        needs: statistics as data, from a config.
        quantize: ``(weight float32 [out, in], statistics or None, scheme, config) -> LayerResult``.
    """

    name: str
    summary: str
    config: type[Any]
    needs: Callable[[Any], frozenset[Stat]]
    quantize: Callable[[Tensor, LinearStatistics | None, Scheme, Any], LayerResult]


@dataclasses.dataclass(frozen=True)
class WindowMethod:
    """A learned method of the table: one set of defaults for the engine in `ptq.learning`.

    Args:
        name: what users type.
        summary: one line for ``ptq methods``.
        config: a subclass of `LearnedConfig` with the method's defaults.
    """

    name: str
    summary: str
    config: type[LearnedConfig]


def make_config(method: LayerMethod | WindowMethod, options: Mapping[str, Any]) -> Any:
    """The method's config from plain options.

    Raises:
        UsageError: an unknown option (near names are offered) or a value the config refuses.
    """
    names = [field.name for field in dataclasses.fields(method.config)]
    for key, value in options.items():
        if key not in names:
            raise unknown_name(f"option of {method.name}", key, names or ["(it has none)"])
        _check_type(f"{method.name}.{key}", value, getattr(method.config(), key))
    try:
        return method.config(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{method.name}: {error}") from error


def _check_type(where: str, value: Any, default: Any) -> None:
    """An option has the type of its default; a whole number will do for a float, a truth value not for a number."""
    wanted = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
        raise UsageError(f"{where} is a {type(default).__name__}, got {value!r}.")


def parse_options(method: LayerMethod | WindowMethod, texts: Mapping[str, str]) -> dict[str, Any]:
    """Option values from text (``--option key=value``), each read as the type of the option's default.

    Raises:
        UsageError: an unknown option, or text that is not of that type.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(method.config)}
    parsed: dict[str, Any] = {}
    for key, text in texts.items():
        if key not in defaults:
            raise unknown_name(f"option of {method.name}", key, defaults or ["(it has none)"])
        parsed[key] = _parse(f"{method.name}.{key}", text, defaults[key])
    return parsed


def _parse(where: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{where} is true or false, got {text!r}.")
        return text.lower() == "true"
    if isinstance(default, str):
        return text
    try:
        return type(default)(text)
    except ValueError as error:
        raise UsageError(f"{where} is a number ({type(default).__name__}), got {text!r}.") from error


def finish(codes: Tensor, grid: BoundGrid, scheme: Scheme) -> QuantizedWeight:
    """A `QuantizedWeight` from codes and the grid they were rounded onto (its scales are stored values already).

    Raises:
        ValueError: the grid is not the integer grid that ``scheme`` describes, so that the stored codes would be read
            as other values.
    """
    if not grid.grid.uniform or len(grid.grid.levels) != 2**scheme.bits:
        raise ValueError(
            f"codes of a grid of {len(grid.grid.levels)} {'equal steps' if grid.grid.uniform else 'unequal levels'} "
            f"cannot be stored as {scheme.describe()}: a scheme describes integer grids only."
        )
    zero = None if scheme.symmetric else grid.zero.to(torch.uint8)
    return QuantizedWeight(codes, grid.scale.to(SCALE_DTYPES[scheme.scale_dtype]), zero, scheme)
