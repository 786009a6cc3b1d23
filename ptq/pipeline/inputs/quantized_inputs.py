"""What the quantized model does to the inputs of a block's linears, to keys and to values, applied during the run."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from calib.runner.block import BlockContext
from ptq.errors import ModelError
from ptq.pipeline.inputs.input_transforms import transform_block_inputs
from ptq.pipeline.preparation.schemes.block_maps import BlockKind, block_kind
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan
from ptq.runtime.kv_cache import supports_key_values
from ptq.scheme import KeyValueScheme

__all__ = ["QuantizedInputs"]


class QuantizedInputs:
    """Applies schemes of inputs, keys and values to the blocks of one model.

    Args:
        model: The skeleton.
        assignment: What is done to its linears.
        key_values: How keys and values are rounded; ``None`` leaves them as they are.
        rounds: Whether anything is rounded during the run; otherwise inputs are only rotated.
        fits_inputs: Whether the method finds the parameters of static input formats.
    """

    def __init__(
        self,
        model: nn.Module,
        assignment: Plan,
        key_values: KeyValueScheme | None,
        *,
        rounds: bool = True,
        fits_inputs: bool = False,
    ) -> None:
        self._assignment, self._key_values = assignment, key_values
        self._rounds, self._fits_inputs = rounds, fits_inputs
        self._kinds = {block_kind(model.get_submodule(name)) for name in assignment.blocks}
        self._checked: set[BlockKind] = set()
        self._reached = False

    def apply(self, context: BlockContext, fraction: Callable[[], float] = lambda: 1.0) -> None:
        """Treat the block's inputs from now on, in the quantized stream, as at run time.

        Args:
            context: The block.
            fraction: Of the channels that are rounded, asked at every call.

        Raises:
            ModelError: Keys and values are to be rounded, and the block's attention cannot be reached.
        """
        if self._key_values is not None:
            self._check_key_values(context)
        transform_block_inputs(
            context,
            self._assignment.in_block(context.name),
            self._key_values,
            fraction,
            rounds=self._rounds,
            fits_inputs=self._fits_inputs,
        )

    def _check_key_values(self, context: BlockContext) -> None:
        """Check once for every kind of block that rounding keys and values has an effect. Blocks without attention are
        passed over, if there are others."""
        kind = block_kind(context.block)
        if kind in self._checked:
            return
        self._checked.add(kind)
        hidden, call = context.runner.hidden(0, full=True), context.runner.call(0, context.index, full=True)
        context.use(full=True)
        with context.plain_inputs():
            self._reached |= supports_key_values(context.block, lambda: call(context.block, hidden))
        if not self._reached and self._kinds <= self._checked:
            raise ModelError(
                f"{context.name}: the attention of {type(context.block).__name__} does not go through transformers' "
                f"attention interface, so its keys and values cannot be rounded. Leave out --kv-bits."
            )
