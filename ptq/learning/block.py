"""`BlockLearner`: everything that is learned in one block, and the block run with it.

The block's own module runs, with other tensors in the place of its parameters (`torch.func.functional_call`): rounded
weights, and where channels are scaled the gains and biases that take the scales up. Nothing of this costs anything at
run time: it all folds into codes, scales and the block's other parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from calib.model.block_inputs import BlockCall, first_tensor
from calib.runner.block import BlockContext
from calib.runner.forward import check_range
from ptq.learning.config import LearnedConfig
from ptq.learning.linear import KINDS, LinearLearner, round_together
from ptq.quantized import QuantizedWeight
from ptq.scheme import Scheme
from ptq.transforms.scaling.search import ScaleUse, Scaling, apply_scaling

__all__ = ["BlockLearner", "window_tensors"]

_SMALLEST_SCALE = 1e-2


class BlockLearner:
    """The learnables of one block.

    Args:
        context: the block.
        schemes: of the linears that are quantized, by name in the block.
        config: what is learned.
        scalings: channel scalings that leave the block's output as it is (`ptq.transforms.scaling.search`).
        seed: of everything that is drawn, together with the linear's name.
        anchors: starting points by linear.
        init: the method that made them.

    Attributes:
        share: of the input channels that are quantized at the moment; linears' inputs follow it, too.

    Raises:
        NumericalError: a weight holds NaN or Inf, or numbers whose squared errors would overflow.
    """

    def __init__(
        self,
        context: BlockContext,
        schemes: Mapping[str, Scheme],
        config: LearnedConfig,
        *,
        scalings: Sequence[Scaling] = (),
        seed: int = 0,
        anchors: Mapping[str, QuantizedWeight] | None = None,
        init: str = "none",
    ) -> None:
        self.context, self.config, self.init, self._share = context, config, init, 1.0
        anchors = anchors or {}
        for name in schemes:
            check_range(context.full(name), f"{context.name}.{name}")
        self.linears = {
            name: LinearLearner(
                context.full(name), scheme, config, _generator(seed, f"{context.name}.{name}"), anchors.get(name)
            )
            for name, scheme in schemes.items()
        }
        self._dtypes = {name: context.full(name).dtype for name in schemes}
        device = context.runner.device
        self.scalings = tuple(scaling.to(device) for scaling in scalings) if schemes else ()
        self.scales = {s.name: torch.ones(s.size, device=device).requires_grad_() for s in self.scalings}
        self._uses: dict[str, list[tuple[str, ScaleUse]]] = {}
        for scaling in self.scalings:
            for use in scaling.uses:
                self._uses.setdefault(use.parameter, []).append((scaling.name, use))
        weights = {f"{name}.weight": name for name in context.linears}
        self._dense = {name: self._logical(name, weights) for name in self._uses if weights.get(name) not in schemes}

    def _logical(self, parameter: str, weights: Mapping[str, str]) -> Tensor:
        """The full-precision value of a parameter; weights as ``[out, in]``."""
        if parameter in weights:
            return self.context.full(weights[parameter])
        return self.context.block.get_parameter(parameter).detach()

    @property
    def share(self) -> float:
        return self._share

    @share.setter
    def share(self, share: float) -> None:
        self._share = share
        self.context.use(full=True)  # keys and values are told of their share when the quantized stream comes into use
        self.context.use(full=False)

    # -- what is learned ---------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        """All learnable tensors by a name of their own: ``linear:tensor``, or ``:scaling``."""
        found = {f"{name}:{key}": value for name, one in self.linears.items() for key, value in one.parameters.items()}
        return found | {f":{name}": scale for name, scale in self.scales.items()}

    def rate_of(self, parameter: str, steps: int) -> float:
        """Learning rate of one of `parameters`, for so many steps."""
        linear, _, key = parameter.rpartition(":")
        scheme = self.linears[linear].scheme if linear else next(iter(self.linears.values())).scheme
        return float(getattr(self.config.rates(scheme, steps), KINDS[key] if linear else "scale"))

    @torch.no_grad()
    def keep_inside(self) -> None:
        """After a step: everything that is bounded back into its bounds."""
        for one in self.linears.values():
            one.keep_inside()
        for scale in self.scales.values():
            scale.clamp_(min=_SMALLEST_SCALE)

    def state(self) -> dict[str, Tensor]:
        """Copies of `parameters` on the CPU, to be stored."""
        return {name: value.detach().cpu().clone() for name, value in self.parameters().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: a tensor is missing.
        """
        for name, value in self.parameters().items():
            value.copy_(state[name])

    def regularizer(self, power: float) -> Tensor | None:
        """The sum of the linears' (`LinearLearner.regularizer`)."""
        terms = [term for one in self.linears.values() if (term := one.regularizer(power)) is not None]
        return torch.stack(terms).sum() if terms else None

    # -- the block with it -------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What stands in the place of the block's parameters, by name, as the block stores them, in its dtype."""
        return window_tensors([self])[0]

    def targets(self) -> list[Tensor]:
        """The linears' weights before rounding, float32 ``[out, in]``."""
        return [one.target(self._scaled(f"{name}.weight")) for name, one in self.linears.items()]

    def in_place(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """See `tensors`; ``weights`` are the linears' rounded ones."""
        found = {
            f"{name}.weight": self._as_stored(name, weight.to(self._dtypes[name]))
            for name, weight in zip(self.linears, weights, strict=True)
        }
        return found | {name: self._changed(name, value) for name, value in self._dense.items()}

    def _changed(self, name: str, value: Tensor) -> Tensor:
        scaled = self._scaled(name)
        assert scaled is not None
        changed = scaled(value.float()).to(self.context.stored_dtypes[name]).to(value.dtype)  # as it will be stored
        linear = name.removesuffix(".weight")
        return (
            self._as_stored(linear, changed) if linear in self.context.linears and name.endswith(".weight") else changed
        )

    def _as_stored(self, linear: str, weight: Tensor) -> Tensor:
        return weight.T if isinstance(self.context.linears[linear], Conv1D) else weight

    def _scaled(self, parameter: str) -> Callable[[Tensor], Tensor] | None:
        """How channel scales change a parameter; ``None`` if they do not."""
        uses = self._uses.get(parameter)
        if not uses:
            return None

        def change(value: Tensor) -> Tensor:
            for scaling, use in uses:
                value = apply_scaling(value, use, self.scales[scaling])
            return value

        return change

    def run(self, call: BlockCall, hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The block's output for ``hidden`` ``[sequences, tokens, width]`` with these `tensors`, with gradients."""
        args, kwargs = call.arguments(hidden)
        return first_tensor(functional_call(self.context.block, dict(tensors), args, kwargs))

    @torch.no_grad()
    def settle(self) -> None:
        """Put the rounded weights at the present share into the block, for the quantized stream to pass through."""
        rounded = round_together(list(self.linears.values()), self.targets(), self.share, hard=True)
        for name, weight in zip(self.linears, rounded, strict=True):
            self.context.replace(name, weight)
        for name, value in self.changed().items():
            self.context.replace_parameter(name, value)

    @torch.no_grad()
    def fold(self) -> dict[str, QuantizedWeight]:
        """The result by linear."""
        return {name: one.fold(self._scaled(f"{name}.weight")) for name, one in self.linears.items()}

    @torch.no_grad()
    def changed(self) -> dict[str, Tensor]:
        """Other parameters of the block that have taken up channel scales, as the block stores them."""
        return {name: self._changed(name, value) for name, value in self._dense.items()}


def window_tensors(blocks: Sequence[BlockLearner], *, hard: bool = False) -> list[dict[str, Tensor]]:
    """`BlockLearner.tensors` of several blocks, rounded together; all have the same share.

    Args:
        hard: with every choice of soft rounding made, as it will be stored.
    """
    linears = [one for block in blocks for one in block.linears.values()]
    targets = [target for block in blocks for target in block.targets()]
    rounded = round_together(linears, targets, blocks[0].share, hard=hard)
    found, start = [], 0
    for block in blocks:
        stop = start + len(block.linears)
        found.append(block.in_place(rounded[start:stop]))
        start = stop
    return found


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for every linear, so that draws do not depend on the order of work."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
