"""The weights of one block in both streams, and what happens to its linears' inputs in the quantized one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calib.model.structure import find_linears, linear_weight, set_linear_weight
from calib.runner.forward import move_to

__all__ = ["BlockWeights", "InputTransform"]


class InputTransform(Protocol):
    """What happens to a linear's input in the quantized model: it is quantized, or rotated, or both."""

    @property
    def follows_statistics(self) -> bool:
        """Whether statistics are of ``x`` itself, because what happens to it is found from them."""

    def __call__(self, x: Tensor) -> Tensor:
        """What the linear gets in the place of ``x``, in its shape and dtype."""

    def full(self, x: Tensor) -> Tensor:
        """The same without loss: the full-precision counterpart of what it gets."""

    def on_weight(self, weight: Tensor) -> Tensor:
        """The weight ``[out, in]`` with which ``full(x)`` gives what the original gives with ``x``."""


class BlockWeights:
    """A block whose linears hold the checkpoint's weights or those that were put in their place.

    Args:
        block: the module with its checkpoint weights; moved to ``device`` in ``dtype``.
        device: where it is run.
        dtype: dtype of the passes.
        two_streams: whether there is a full-precision stream; one stream alone is the quantized one.
        runs: whether the block is run at all; replacements are dropped where it is not.

    Attributes:
        linears: the block's linears by name in the block.
        stored_dtypes: dtypes of the block's parameters in the checkpoint, by name in the block.
    """

    def __init__(
        self, block: nn.Module, *, device: torch.device, dtype: torch.dtype, two_streams: bool, runs: bool
    ) -> None:
        self.block, self._two_streams, self._runs = block, two_streams, runs
        self.linears: Mapping[str, nn.Module] = find_linears(block)
        self._originals = {name: linear_weight(module).detach() for name, module in self.linears.items()}
        self.stored_dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
        move_to(block, device, dtype)
        self._full = {name: linear_weight(module).detach() for name, module in self.linears.items()}
        self._replaced: dict[str, Tensor] = {}
        self._changed: dict[str, tuple[Tensor, Tensor]] = {}  # other parameters: the checkpoint's value, the new one
        self._full_in_use = False
        self._quantizes = False  # whether the linears' inputs are being quantized
        self._on_stream: Callable[[bool], object] | None = None
        self._input_transforms: dict[str, InputTransform] = {}
        self._handles: list[Any] = []

    def original(self, name: str) -> Tensor:
        """The checkpoint's weight of a linear ``[out, in]``, as stored."""
        return self._originals[name]

    def full(self, name: str) -> Tensor:
        """The full-precision weight ``[out, in]`` for what the linear gets in the quantized stream, in the dtype and on
        the device of the passes."""
        return self.weight_for_transformed_input(name, self._full[name])

    def input_transform(self, name: str) -> InputTransform | None:
        """What the quantized stream does to a linear's input, and has had done to its weight (`transform_inputs`)."""
        return self._input_transforms.get(name)

    def weight_for_transformed_input(self, name: str, weight: Tensor) -> Tensor:
        """A linear's weight for inputs that are transformed (`transform_inputs`)."""
        return self._input_transforms[name].on_weight(weight) if name in self._input_transforms else weight

    def transformed_full_input(self, name: str, inputs: Tensor) -> Tensor:
        """The full-precision stream's inputs of a linear, to be compared with what it gets in the quantized one."""
        return self._input_transforms[name].full(inputs) if name in self._input_transforms else inputs

    def replace(self, name: str, weight: Tensor) -> None:
        """From now on the quantized stream runs with ``weight`` ``[out, in]`` in this linear."""
        if not self._runs:
            return  # nothing will be run any more
        self._replaced[name] = weight.to(self._full[name])
        if not self._full_in_use:
            set_linear_weight(self.linears[name], self._replaced[name])

    def replace_parameter(self, name: str, value: Tensor) -> None:
        """From now on the quantized stream runs with ``value`` in the place of a parameter that is no quantized weight,
        by its name in the block (the gain of a norm, a bias); in the parameter's own shape and dtype."""
        module, _, leaf = name.rpartition(".")
        known = self._changed.get(name)
        full = known[0] if known else self.block.get_submodule(module)._parameters[leaf]
        assert full is not None
        self._changed[name] = (full.detach(), value.detach().to(full))
        if not self._full_in_use:
            self._set_parameter(name, self._changed[name][1])

    def use(self, *, full: bool) -> None:
        """Put the weights of one stream into the block, for whoever runs it next."""
        full = full and self._two_streams  # one stream alone is the quantized one
        if full == self._full_in_use:
            return
        weights = self._full if full else self._replaced
        for name in self._replaced:
            set_linear_weight(self.linears[name], weights[name])
        for name, values in self._changed.items():
            self._set_parameter(name, values[0 if full else 1])
        self._full_in_use = full
        self._switch(quantize=not full)

    def _set_parameter(self, name: str, value: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        self.block.get_submodule(module)._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    @contextlib.contextmanager
    def weights_under(self, prefix: str, *, full: bool) -> Iterator[None]:
        """One stream's weights in the linears under ``prefix`` alone; those of the whole block stay as they are."""
        names = [name for name in self._replaced if name.startswith(prefix)] if full != self._full_in_use else []
        for name in names:
            set_linear_weight(self.linears[name], (self._full if full else self._replaced)[name])
        before, self._quantizes = self._quantizes, not full
        try:
            yield
        finally:
            self._quantizes = before
            for name in names:
                set_linear_weight(self.linears[name], (self._replaced if full else self._full)[name])

    def drop_weights(self) -> None:
        """Drop every reference to weights, and the input transforms."""
        self.remove_input_transforms()
        self._originals, self._full, self._replaced, self._changed = {}, {}, {}, {}

    # -- what the quantized stream's linears are given ---------------------------------------------------------------

    def transform_inputs(
        self, transforms: Mapping[str, InputTransform], on_stream: Callable[[bool], object] | None = None
    ) -> None:
        """From now on these linears, by name in the block, get ``transforms[name](x)`` in the place of ``x`` whenever
        the block runs for the quantized stream. Statistics are of what they get, and weights those for it.

        Args:
            transforms: linears that read the same tensor have equal ones.
            on_stream: called with ``True`` when the block begins to run for the quantized stream, and with ``False``
                when it stops: for what else differs between the streams (keys and values).
        """
        for name, transform in transforms.items():
            self._handles.append(self._change_input(self.linears[name], transform))
        self._input_transforms, self._on_stream = dict(transforms), on_stream
        self._switch(quantize=not self._full_in_use)

    def remove_input_transforms(self) -> None:
        """The opposite of `transform_inputs`."""
        self._switch(quantize=False)
        for handle in self._handles:
            handle.remove()
        self._handles, self._input_transforms, self._on_stream = [], {}, None

    def _change_input(self, linear: nn.Module, transform: InputTransform) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._quantizes:
                return None
            if args:
                return (transform(args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: transform(kwargs[first])}

        return linear.register_forward_pre_hook(hook, with_kwargs=True)

    def _switch(self, *, quantize: bool) -> None:
        self._quantizes = quantize
        if self._on_stream is not None:
            self._on_stream(quantize)

    @contextlib.contextmanager
    def plain_inputs(self) -> Iterator[None]:
        """Nothing that linears are given is quantized inside."""
        before = self._quantizes
        self._switch(quantize=False)
        try:
            yield
        finally:
            self._switch(quantize=before)
