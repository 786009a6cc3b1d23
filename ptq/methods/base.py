"""The seams. Of layer-wise methods: a frozen config, the statistics it needs, and a function on tensors.

A `LayerMethod` knows a weight, its statistics and a scheme. It does not know the model, the walk, the other layers, the
format the result is stored in, or who chose the scheme.

Of learned methods: a config alone. A `WindowMethod` says as data in which windows what is learned and how, and the
engine in `ptq.learning` does it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from calib.stats import LinearStatistics, Stat
from ptq.errors import UsageError, unknown_name
from ptq.learning import LearnedConfig
from ptq.quantized import QuantizedWeight
from ptq.scheme import Scheme

__all__ = ["LayerMethod", "LayerResult", "WindowMethod", "check_scheme", "make_config", "parse_options"]


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """A quantized weight and what the method wants the record to say.

    Args:
        weight: the result.
        figures: the method's own figures by name, e.g. ``{"alpha": 0.8, "r2": 0.9, "damping": 0.01}``.
        notes: every fallback that was taken, a sentence each.
        flops: floating-point operations of matrix products and factorizations; what linears share is counted by the one
            that made it. The search of scales and other elementwise work is not counted.
        losses: measures the relative output errors of nearest rounding and of what was chosen, where only the method
            can because its inputs are rounded, too; ``None`` leaves them to `ptq.pipeline.output_error`. Called once,
            before the next linear, and not counted as a part of the solve.
    """

    weight: QuantizedWeight
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    flops: int = 0
    losses: Callable[[], tuple[float, float]] | None = None


def any_scheme(scheme: Scheme) -> str | None:
    """The answer of methods that round onto whatever grid they are given."""
    return None


def as_asked(scheme: Scheme, config: Any) -> Scheme:
    """The answer of methods that produce the scheme that they are asked for."""
    return scheme


def never(config: Any) -> bool:
    """The answer of methods that see what was quantized before a linear."""
    return False


def integers_only(scheme: Scheme) -> str | None:
    """The answer of methods that compute with integer codes."""
    if scheme.format != "int":
        return "it computes with integer codes"
    if scheme.act_format is not None:
        return f"it learns with inputs of --act-bits and not of the activation format {scheme.act_format}"
    return None


@dataclasses.dataclass(frozen=True)
class LayerMethod:
    """One entry of the table of methods.

    Args:
        name: what users type.
        summary: one line for ``ptq methods``.
        config: frozen dataclass of the method's options, all with defaults, validated in ``__post_init__``.
        needs: statistics as data, from a config.
        quantize: ``(weight float32 [out, in], statistics or None, scheme, config, shared) -> LayerResult``; ``shared``
            are the parameters that linears of one input group have in common (`NumberFormat.share`).
        unsupported_reason: why the method cannot produce a scheme, or ``None``.
        defaults: fields of the scheme that a user gets who names only the method.
        adapt: the scheme that the method begins with, from the one asked for and its options.
        full_inputs: whether every linear is quantized for the inputs that it has in the full-precision model, as if
            nothing before it were quantized.
        fits_inputs: whether the method finds the parameters of static input formats itself, from inputs that are not
            rounded.
        with_data: options that a user gets who names calibration data, of a method that works without.
    """

    name: str
    summary: str
    config: type[Any]
    needs: Callable[[Any], frozenset[Stat]]
    quantize: Callable[[Tensor, LinearStatistics | None, Scheme, Any, Mapping[str, Tensor]], LayerResult]
    unsupported_reason: Callable[[Scheme], str | None] = any_scheme
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapt: Callable[[Scheme, Any], Scheme] = as_asked
    full_inputs: Callable[[Any], bool] = never
    fits_inputs: bool = False
    with_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class WindowMethod:
    """A learned method of the table: one set of defaults for the engine in `ptq.learning`.

    Args:
        name: what users type.
        summary: one line for ``ptq methods``.
        config: a subclass of `LearnedConfig` with the method's defaults.
        unsupported_reason: why the method cannot produce a scheme, or ``None``.
        defaults: fields of the scheme that a user gets who names only the method.
    """

    name: str
    summary: str
    config: type[LearnedConfig]
    unsupported_reason: Callable[[Scheme], str | None] = integers_only
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_scheme(
    method: LayerMethod | WindowMethod,
    scheme: Scheme,
    methods: Iterable[LayerMethod | WindowMethod],
    config: Any = None,
) -> None:
    """Check before a run that a method can produce a scheme.

    Args:
        method: the method asked for.
        scheme: the scheme asked for.
        methods: all methods, to name those that can.
        config: the method's options.

    Raises:
        UsageError: it cannot; names the methods that can. Or its option ``scales`` is none of the number format's.
    """
    reason = method.unsupported_reason(scheme)
    if reason is not None:
        able = ", ".join(sorted(other.name for other in methods if other.unsupported_reason(scheme) is None))
        raise UsageError(
            f"the method {method.name} cannot produce {scheme.describe()}: {reason}. Methods that can: "
            f"{able or 'none'}."
        )
    search, searches = getattr(config, "scales", None), scheme.number_format.searches
    if search is not None and search not in searches:
        raise UsageError(
            f"{method.name}: the number format {scheme.format} takes scales={', '.join(searches)}, got {search!r}."
        )


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
