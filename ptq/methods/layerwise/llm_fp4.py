"""LLM-FP4 (arXiv 2310.16836): weights and activations in 4-bit floating point, formats and ranges found by search.

Every linear gets a number format (E2M1, E1M2 or E3M0) with a scale per output channel, and its input a static format
with one scale and a shift per channel, which moves the channels' ranges into powers of two. Both are searched in turn
on the error of the linear's output (`ptq.solvers.float_search`). By default every linear is searched for the inputs
that it has in the full-precision model, as in the paper; ``sequential`` takes those of the model quantized so far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from calib.stats import LinearStatistics, Stat
from ptq.activation_formats.static_float import StaticFloat, static_float
from ptq.activation_formats.static_input import StaticInput, fit_static_input
from ptq.errors import NumericalError, UsageError, unknown_name
from ptq.grids.floating_point import FloatFormat, float_formats
from ptq.methods.base import LayerMethod, LayerResult
from ptq.methods.common import require
from ptq.quantized import QuantizedWeight
from ptq.scheme import SCALE_DTYPES, Scheme
from ptq.solvers.float_errors import GramErrors, TokenChoice, output_errors
from ptq.solvers.float_search import (
    NO_CLIP,
    RATIOS,
    TOKENS,
    FloatWeight,
    SearchResult,
    search_float,
    search_weight,
    weight_at,
)

__all__ = ["LLM_FP4", "LlmFp4Config"]

Shift = Literal["kept", "folded", "off"]
_SUFFIX: dict[str, str] = {"kept": "shifted", "folded": "folded", "off": "static"}
_WEIGHT_BITS = 4


@dataclasses.dataclass(frozen=True)
class LlmFp4Config:
    """Args:
    search: search formats and clip ratios; otherwise the first format of each list and the whole range (min-max).
    shift: powers of two per input channel: ``kept`` beside the activation quantizer, ``folded`` into the weight before
        it is quantized, or ``off``.
    weight_formats: number formats that are tried, separated by commas; ``all`` is E2M1, E1M2 and E3M0.
    act_formats: likewise for inputs; ``all`` is every split of their bits with 1 to 5 exponent bits.
    rounds: how often weights and inputs are searched in turn.
    sequential: search for the inputs of the model quantized so far, not for those of the full-precision model.
    """

    search: bool = True
    shift: Shift = "kept"
    weight_formats: str = "all"
    act_formats: str = "all"
    rounds: int = 3
    sequential: bool = False

    def __post_init__(self) -> None:
        if self.shift not in _SUFFIX:
            raise unknown_name("shift", self.shift, _SUFFIX)
        if not 1 <= self.rounds <= 100:
            raise UsageError(f"llm-fp4: rounds is 1 to 100, got {self.rounds!r}.")
        _formats(self.weight_formats, _WEIGHT_BITS, "weight_formats")


def _formats(names: str, bits: int, option: str) -> tuple[FloatFormat, ...]:
    """The formats of an option, in its order."""
    known = {number.name: number for number in float_formats(bits)}
    if names == "all":
        return tuple(known.values())
    chosen = [name.strip().lower() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise unknown_name(f"format of {bits} bits in {option} of llm-fp4", name, [*known, "all"])
    return tuple(known[name] for name in dict.fromkeys(chosen))


def adapt(scheme: Scheme, config: LlmFp4Config) -> Scheme:
    """The scheme with the first of the formats that are tried in the place of the bits asked for.

    A number format that the method cannot produce stays, and is refused as it is.

    Raises:
        UsageError: an activation format was asked for, or bits that the search does not have.
    """
    if scheme.format not in (number.name for number in float_formats(_WEIGHT_BITS)):
        return scheme
    if scheme.act_format is not None:
        raise UsageError(
            f"llm-fp4 searches the format of inputs: give their bits (--act-bits 4) and not the format "
            f"{scheme.act_format}; -O act_formats=e2m1 tries a single one."
        )
    scheme = dataclasses.replace(scheme, format=_formats(config.weight_formats, _WEIGHT_BITS, "")[0].name)
    if scheme.act_bits is None:
        return scheme
    if scheme.act_bits < _WEIGHT_BITS:
        raise UsageError(
            f"llm-fp4 has floating-point inputs of 4 to 8 bits, got {scheme.act_bits}: --act-bits 4 to 8, or 16 to "
            "leave inputs as they are."
        )
    first = _formats(config.act_formats, scheme.act_bits, "act_formats")[0]
    act_format = static_float(first, _SUFFIX[config.shift]).name
    return dataclasses.replace(scheme, act_bits=None, act_symmetric=False, act_format=act_format)


def unsupported_reason(scheme: Scheme) -> str | None:
    """Why the method cannot produce a scheme: it searches one scale per output channel."""
    names = [number.name for number in float_formats(_WEIGHT_BITS)]
    if scheme.format not in names:
        return f"it has weights of {', '.join(names)} (--format {names[0]})"
    if scheme.group_size is not None:
        return "it searches one scale per output channel (--group-size 0)"
    if scheme.act_format is not None and not isinstance(scheme.activation_format, StaticFloat):
        return "it has inputs with one floating-point scale from calibration (--act-bits 4)"
    return None


def needs(config: LlmFp4Config) -> frozenset[Stat]:
    return frozenset({Stat.HESSIAN, Stat.RANGES, Stat.SAMPLES})


def quantize(
    weight: Tensor,
    stats: LinearStatistics | None,
    scheme: Scheme,
    config: LlmFp4Config,
    shared: Mapping[str, Tensor] | None = None,
) -> LayerResult:
    """Search formats and ranges of ``weight`` ``[out, in]`` and of its input."""
    stats = require(stats)
    record, dtype = scheme.activation_format, SCALE_DTYPES[scheme.scale_dtype]
    weight_formats = _formats(config.weight_formats, _WEIGHT_BITS, "weight_formats")
    start = weight_at(weight, weight_formats[0], NO_CLIP, dtype)
    if record is None:
        found = search_weight(weight, GramErrors(stats.hessian), weight_formats, dtype)[0] if config.search else start
        figures = _weight_figures(SearchResult(found, None, int(config.search)))
        return LayerResult(_stored(weight, found, scheme), figures)
    assert isinstance(record, StaticFloat)
    samples, largest, shift = stats.samples, stats.ranges.abs().amax(0), config.shift != "off"
    input_formats = _formats(config.act_formats, record.bits, "act_formats")
    first = fit_static_input(largest, input_formats[0], shift=shift)
    rounds = config.rounds if config.search else 0
    result = search_float(weight, samples, largest, weight_formats, input_formats, dtype, shift=shift, rounds=rounds)
    assert result.inputs is not None
    quantizer, target = result.inputs.quantizer, weight
    if config.shift == "folded":
        result, target = _folded(weight, samples, result, weight_formats, dtype, search=config.search)
        quantizer = dataclasses.replace(quantizer, folded=True)

    def losses() -> tuple[float, float]:
        candidates = ((first, start.round(weight)), (quantizer, result.weight.round(target)))
        nearest, loss = output_errors(samples, weight, candidates)
        return nearest, loss

    own = static_float(quantizer.number, record.suffix)
    stored = _stored(target, result.weight, dataclasses.replace(scheme, act_format=own.name), own.params(quantizer))
    return LayerResult(stored, _weight_figures(result) | _input_figures(quantizer, stats.ranges), losses=losses)


def _folded(
    weight: Tensor,
    samples: Tensor,
    found: SearchResult,
    formats: tuple[FloatFormat, ...],
    dtype: torch.dtype,
    *,
    search: bool,
) -> tuple[SearchResult, Tensor]:
    """The weight divided by the powers of two that its inputs were multiplied with, and its own search."""
    assert found.inputs is not None
    quantizer = found.inputs.quantizer
    target = quantizer.folded_weight(weight)
    if not search:
        return dataclasses.replace(found, weight=weight_at(target, formats[0], NO_CLIP, dtype)), target
    chosen = TokenChoice.of(samples, TOKENS)
    errors = chosen.errors(quantizer, chosen.outputs(weight)).folded(quantizer)
    return dataclasses.replace(found, weight=search_weight(target, errors, formats, dtype)[0]), target


def _stored(
    target: Tensor, found: FloatWeight, scheme: Scheme, inputs: Mapping[str, Tensor] | None = None
) -> QuantizedWeight:
    """The codes of ``target`` in the format that was found.

    Raises:
        NumericalError: a scale overflows its dtype.
    """
    scheme = dataclasses.replace(scheme, format=found.number.name)
    if not bool(torch.isfinite(found.scale).all()):
        raise NumericalError(
            f"a scale overflows {scheme.scale_dtype}: the weights are too large. Use scale_dtype='bfloat16'."
        )
    params = {"scale": found.scale.to(SCALE_DTYPES[scheme.scale_dtype])}
    grid = scheme.number_format.grid(params, scheme, target.shape[1])
    weight = QuantizedWeight.from_grid(grid.round(target), grid, scheme)
    return weight if inputs is None else dataclasses.replace(weight, input_params=inputs)


def _weight_figures(found: SearchResult) -> dict[str, float]:
    ratios = torch.tensor(RATIOS)[found.weight.choice.cpu()]
    return {"weight clip": float(ratios.mean()), "rounds": float(found.rounds)}


def _input_figures(quantizer: StaticInput, ranges: Tensor) -> dict[str, float]:
    """Clip ratio and shifts of the input's quantizer, and the range that its input had."""
    largest = float(ranges.abs().max())
    top = float(quantizer.scale) * quantizer.number.maximum
    shift = quantizer.shift
    return {
        "input clip": top / largest if largest else 1.0,
        "input min": float(ranges[0].min()),
        "input max": float(ranges[1].max()),
        "mean shift": 0.0 if shift is None else float(shift.float().mean()),
        "largest shift": 0.0 if shift is None else float(shift.max()),
    }


def full_inputs(config: Any) -> bool:
    return not config.sequential


LLM_FP4 = LayerMethod(
    "llm-fp4",
    "4-bit floating point: format and range of weights and inputs by search, shifts per input channel",
    LlmFp4Config,
    needs,
    quantize,
    unsupported_reason=unsupported_reason,
    defaults={"format": "e2m1", "bits": 4, "symmetric": True, "group_size": None},
    adapt=adapt,
    full_inputs=full_inputs,
    fits_inputs=True,
)
