"""What the quantized stream's linears are given while a model is quantized: the same as at run time.

A scheme can have a linear's input rotated and rounded, a recipe keys and values. Both act in the runner's quantized
stream, so that methods see, and learn on, what the quantized model will compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor

from calib.runner.block import BlockContext
from ptq.quantized import QuantizedWeight
from ptq.runtime.activations import quantize_tokens
from ptq.runtime.kv_cache import set_key_values
from ptq.scheme import KeyValueScheme, Scheme
from ptq.transforms.hadamard import InputRotation

__all__ = ["SchemeInputTransform", "input_figures", "input_params", "stored_scheme", "transform_block_inputs"]


class SchemeInputTransform:
    """A linear's input as `ptq.runtime.linear.QuantLinear` transforms it; a `calib.runner.block.InputTransform`.

    Args:
        scheme: of the linear; width: of its input.
        share: of the channels that are rounded at the moment (below 1 only while a method learns).
        rounds: whether inputs are rounded at all, or only rotated.
        follows_statistics: whether the parameters of a static format are the method's, so that inputs are not rounded
            until the linear is done.
    """

    def __init__(
        self,
        scheme: Scheme,
        width: int,
        share: Callable[[], float],
        *,
        rounds: bool = True,
        follows_statistics: bool = False,
    ) -> None:
        self._scheme, self._share, self._rounds = scheme, share, rounds
        self.follows_statistics = follows_statistics
        self._rotation = None if scheme.input_rotation is None else InputRotation.of(scheme.input_rotation, width)
        self.params: Mapping[str, Tensor] = {}
        """The parameters of a static format, once they are known (`ptq.pipeline.inputs.input_ranges`)."""
        self.figures: Mapping[str, float] = {}
        """What the record of the linear says about its input, by name."""

    def __call__(self, x: Tensor) -> Tensor:
        x = self.full(x)
        record, bits = self._scheme.activation_format, self._scheme.act_bits
        if not self._rounds or (self.follows_statistics and not self.params):
            return x
        if record is not None:
            return record.quantize(x, self.params)
        return x if bits is None else quantize_tokens(x, bits, self._scheme.act_symmetric, self._share())

    def missing_params(self) -> list[str]:
        """Names of parameters that the format stores and that are not known."""
        record = self._scheme.activation_format
        return [] if record is None else sorted(record.tensor_specs(record.block or 1).keys() - self.params.keys())

    def adopt(self, weight: QuantizedWeight) -> None:
        """From now on inputs are rounded in the format and with the parameters that a finished linear came with."""
        self._scheme = dataclasses.replace(self._scheme, act_format=weight.scheme.act_format)
        self.params = weight.input_params

    def full(self, x: Tensor) -> Tensor:
        """The input, rotated only."""
        return x if self._rotation is None else self._rotation(x)

    def on_weight(self, weight: Tensor) -> Tensor:
        """The weight for rotated inputs."""
        return weight if self._rotation is None else self._rotation.on_weight(weight)

    def on_scheme(self, scheme: Scheme) -> Scheme:
        """The scheme with what this does to the input, in the place of what it says."""
        own = self._scheme
        return dataclasses.replace(
            scheme,
            act_bits=own.act_bits,
            act_symmetric=own.act_symmetric,
            act_format=own.act_format,
            input_rotation=own.input_rotation,
        )


def stored_scheme(context: BlockContext, name: str, scheme: Scheme) -> Scheme:
    """The scheme that a checkpoint states for a linear.

    What it says of the input is taken from the transform that the linear's weight went through, and not from the plan:
    a checkpoint that rotates inputs at run time holds a rotated weight.

    Args:
        context: the block, after its linears were quantized.
        name: the linear's name in the block.
        scheme: what the weight was quantized for.

    Raises:
        RuntimeError: the plan asks for a transform that was not applied, or the reverse.
    """
    plain = dataclasses.replace(scheme, act_bits=None, act_symmetric=False, act_format=None, input_rotation=None)
    transform = context.input_transform(name)
    applied = plain if transform is None else transform.on_scheme(plain)  # type: ignore[attr-defined]
    if applied != scheme:
        raise RuntimeError(
            f"{context.name}.{name} was quantized as {applied.describe()!r} and would be stored as "
            f"{scheme.describe()!r}: its input transform was not applied. Please report this."
        )
    return applied


def input_params(context: BlockContext, name: str, weight: QuantizedWeight) -> Mapping[str, Tensor]:
    """The stored parameters of a linear's input format: those that its weight came with, else what was calibrated.

    What a method found is also what the quantized stream rounds with from now on.

    Raises:
        RuntimeError: the format is static and has no parameters.
    """
    transform = context.input_transform(name)
    if not isinstance(transform, SchemeInputTransform):
        return weight.input_params
    if weight.input_params:
        transform.adopt(weight)
    missing = transform.missing_params()
    if missing:
        raise RuntimeError(
            f"{context.name}.{name}: the input format's {missing} were not calibrated. Please report this."
        )
    return transform.params


def input_figures(context: BlockContext, name: str) -> Mapping[str, float]:
    """What calibration saw of a linear's input, by name; nothing where its format takes ranges at run time."""
    transform = context.input_transform(name)
    return transform.figures if isinstance(transform, SchemeInputTransform) else {}


def transform_block_inputs(
    context: BlockContext,
    schemes: Mapping[str, Scheme],
    key_values: KeyValueScheme | None,
    share: Callable[[], float] = lambda: 1.0,
    *,
    rounds: bool = True,
    fits_inputs: bool = False,
) -> None:
    """From now on the quantized stream transforms a block's inputs, keys and values as the quantized model will.

    Args:
        context: the block, before its groups are visited; schemes: by linear in the block; key_values: of the recipe.
        share: of the channels that are rounded, asked at every call.
        rounds: whether anything is rounded; otherwise inputs are only rotated.
        fits_inputs: whether the method finds the parameters of static input formats.
    """
    key_values = key_values if rounds else None
    transforms = {
        name: SchemeInputTransform(
            scheme,
            context.full(name).shape[1],
            share,
            rounds=rounds,
            follows_statistics=fits_inputs and scheme.calibrates_input,
        )
        for name, scheme in schemes.items()
        if scheme.transforms_input
    }

    def switch(quantized: bool) -> None:
        now = None if key_values is None or not quantized else dataclasses.replace(key_values, share=share())
        set_key_values(context.block, now)

    if transforms or key_values is not None:
        context.transform_inputs(transforms, switch if key_values is not None else None)
