"""One stream's passes through one block, stopped wherever statistics are needed.

In **lockstep** every batch's forward runs in a greenlet of its own. It is suspended when it reaches the first input
group, all batches are brought to that point, the caller gathers statistics and replaces weights, and then the same
forwards go on to the next group: the block is run exactly once. What a suspended forward holds (the residual, keys and
values, a group's input) stays in memory meanwhile.

Where that does not fit, or a linear is called several times in one pass, passes are **repeated**: for every group the
block is run again from its start, and abandoned at the group.

Greenlets switch inside one thread, so that the settings of PyTorch that belong to the thread (no gradients) hold in all
of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from calib.model.block_inputs import BlockCall

__all__ = ["Arguments", "BlockPasses", "run_to"]

Arguments = tuple[Any, ...]
"""What a module was called with."""


class _Pass(greenlet):  # type: ignore[misc]  # greenlet has no types
    """The suspended forward of one batch."""

    def __init__(self, owner: BlockPasses, call: BlockCall, hidden: Tensor) -> None:
        super().__init__(lambda: call(owner.block, hidden))
        self.owner = owner
        self.stop: tuple[int, Arguments] | None = None
        self.output: Tensor | None = None

    def go_on(self) -> None:
        """Run to the next point, or to the end."""
        self.stop = None
        result = self.switch()
        if isinstance(result, Tensor):
            self.output = result
        else:
            self.stop = result


class BlockPasses:
    """The passes of one stream through one block.

    Args:
        block: the block.
        call: how the model calls it, by batch.
        hidden: what enters it, by batch.
        batches: how many.
        points: modules at whose call passes stop, by name in the block, in the order of execution.
        lockstep: see the head of this file.
        before_hooks: points at which passes stop before the module's other hooks have changed its input.
        use_weights: called before the block is run, so that it has this stream's weights.
    """

    def __init__(
        self,
        block: nn.Module,
        call: Callable[[int], BlockCall],
        hidden: Callable[[int], Tensor],
        batches: int,
        points: Sequence[str],
        *,
        lockstep: bool,
        before_hooks: frozenset[str] = frozenset(),
        use_weights: Callable[[], None],
    ) -> None:
        self.block, self._call, self._hidden, self._use_weights = block, call, hidden, use_weights
        self._points = {name: number for number, name in enumerate(points)}
        self.lockstep = lockstep
        self._passes: list[_Pass | None] = [None] * batches
        self._handles = (
            [self._stop_at(name, number, name in before_hooks) for name, number in self._points.items()]
            if lockstep
            else []
        )

    def _stop_at(self, name: str, number: int, prepend: bool) -> Any:
        def hook(_: nn.Module, args: Arguments, kwargs: Mapping[str, Any]) -> None:
            current = getcurrent()
            if isinstance(current, _Pass) and current.owner is self:
                assert current.parent is not None
                current.parent.switch((number, (*args, *kwargs.values())))

        return self.block.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)

    def at(self, point: str, batch: int, calls: int = 1) -> list[Arguments]:
        """What the module ``point`` is called with in one batch: one entry a call, none if it is not called.

        Points must be asked for in order.
        """
        if not self.lockstep:
            self._use_weights()
            return run_to(self.block, point, self._call(batch), self._hidden(batch), calls)
        here = self._passes[batch]
        if here is None:
            here = self._passes[batch] = _Pass(self, self._call(batch), self._hidden(batch))
            self._go_on(here)
        number = self._points[point]
        while here.stop is not None and here.stop[0] < number:
            self._go_on(here)
        return [here.stop[1]] if here.stop is not None and here.stop[0] == number else []

    def finish(self, batch: int) -> Tensor:
        """The block's output for one batch; its pass is over."""
        here, self._passes[batch] = self._passes[batch], None
        if here is None:
            self._use_weights()
            return self._call(batch)(self.block, self._hidden(batch))
        while here.stop is not None:
            self._go_on(here)
        assert here.output is not None
        return here.output

    def _go_on(self, here: _Pass) -> None:
        self._use_weights()
        here.go_on()

    def close(self) -> None:
        """Abandon what is suspended."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for here in self._passes:
            if here is not None and not here.dead:
                here.throw()
        self._passes = []


class _Reached(Exception):
    """The input that was asked for is there."""


def run_to(block: nn.Module, point: str, call: BlockCall, hidden: Tensor, calls: int = 1) -> list[Arguments]:
    """What the module ``point`` is called with in a pass that is abandoned after ``calls`` calls of it."""
    found: list[Arguments] = []

    def hook(_: nn.Module, args: Arguments, kwargs: Mapping[str, Any]) -> None:
        found.append((*args, *kwargs.values()))
        if len(found) == calls:
            raise _Reached

    handle = block.get_submodule(point).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(_Reached):
            call(block, hidden)
    finally:
        handle.remove()
    return found
