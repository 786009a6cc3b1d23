"""Ranges of the inputs of a block's linears in the full-precision model, for activation formats that are static.

A static format has to be known before the quantized stream runs with it, so its ranges are measured in a pass of their
own through the block, with the block's full-precision weights on the full-precision activations (where a method keeps
only one stream, on that).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib.runner.block import BlockContext
from ptq.errors import NumericalError
from ptq.pipeline.inputs.input_transforms import SchemeInputTransform
from ptq.scheme import Scheme

__all__ = ["fit_static_inputs"]


@dataclasses.dataclass
class _Range:
    """The largest magnitude of every channel so far, float32 ``[in]``."""

    transform: SchemeInputTransform
    largest: Tensor

    def observe(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = self.transform.full(args[0] if args else next(iter(kwargs.values())))
        if x.numel():
            torch.maximum(self.largest, x.reshape(-1, x.shape[-1]).abs().amax(0).float(), out=self.largest)


def fit_static_inputs(context: BlockContext, schemes: Mapping[str, Scheme]) -> list[str]:
    """Give the input transforms of a block the parameters of their static formats.

    Args:
        context: the block, with its input transforms, before its groups are visited.
        schemes: by linear in the block.

    Returns:
        A sentence per linear that no token reached: it takes the ranges of those like it.

    Raises:
        NumericalError: an input is not finite.
    """
    names = [name for name, scheme in schemes.items() if scheme.calibrates_input]
    if not names or not context.runner.has_tokens:
        return []
    ranges = {name: _measured(context, name) for name in names}
    with context.runner.timing.part("passes", context.runner.device):
        _run(context, ranges)
    notes = []
    for found in ranges.values():
        context.runner.workers.maximum_(found.largest)
    for name, found in ranges.items():
        if not bool(torch.isfinite(found.largest).all()):
            raise NumericalError(
                f"the inputs of {context.name}.{name} hold NaN or Inf. Check the checkpoint, or try --dtype float32 if "
                "the model overflows in half precision."
            )
        largest = found.largest
        if not bool(largest.any()):
            notes.append(f"{context.name}.{name}: no token reached it; the range of its input is that of linears alike")
            largest = _like(name, ranges)
        record = schemes[name].activation_format
        assert record is not None
        found.transform.params = record.fit(largest)
        found.transform.figures = {"input largest": float(largest.max()), **_shifts(found.transform.params)}
    return notes


def _shifts(params: Mapping[str, Tensor]) -> dict[str, float]:
    """Figures of the channels' shifts, where the format has some; by the names that llm-fp4 gives them."""
    if "input_shift" not in params:
        return {}
    shift = params["input_shift"].float()
    return {"mean shift": float(shift.mean()), "largest shift": float(shift.max())}


def _measured(context: BlockContext, name: str) -> _Range:
    transform = context.input_transform(name)
    if not isinstance(transform, SchemeInputTransform):
        raise RuntimeError(f"{context.name}.{name} has a static input format and no input transform")
    width = context.full(name).shape[1]
    return _Range(transform, torch.zeros(width, device=context.runner.device))


def _run(context: BlockContext, ranges: Mapping[str, _Range]) -> None:
    """One pass of all batches through the block, as the checkpoint has it."""
    handles = [
        context.linears[name].register_forward_pre_hook(found.observe, with_kwargs=True)
        for name, found in ranges.items()
    ]
    try:
        for batch in context.runner.batches:
            context.use(full=True)
            with context.plain_inputs():
                context.run(batch, context.runner.hidden(batch, full=True), full=True)
    finally:
        for handle in handles:
            handle.remove()


def _like(name: str, ranges: Mapping[str, _Range]) -> Tensor:
    """Ranges over all linears of the same last name and width (the other experts), else ones."""
    own = ranges[name].largest
    leaf = name.rpartition(".")[2]
    alike = [r.largest for key, r in ranges.items() if key.rpartition(".")[2] == leaf and len(r.largest) == len(own)]
    joint = torch.stack(alike).amax(0)
    return joint if bool(joint.any()) else torch.ones_like(own)
