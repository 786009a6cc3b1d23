"""`LinearLearner`: what is learned about one linear's weight, and the weight that follows from it.

    target = scale_rows_and_columns(W) + B A / r          (channel scales, low-rank addition)
    weight = round(target) on the grid of its groups' ranges, shrunk by the learned clipping

The grid is made anew from the current target at every step. With a starting point from another method (`anchor`) the
grid is that method's, times a learned factor a group, and ``W`` is moved into the cell of the codes that the method
chose: the same codes at the start, but each weight as near to its border as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ptq.learning.config import LearnedConfig
from ptq.learning.rounding import Levels, group_range, levels_of, round_groups, stored
from ptq.quantized import QuantizedWeight
from ptq.scheme import SCALE_DTYPES, Scheme

__all__ = ["KINDS", "LinearLearner", "round_together", "soft_rounding"]

KINDS = {
    "lora_a": "lora", "lora_b": "lora", "clip_low": "clip", "clip_high": "clip", "factor": "clip",
    "offset": "offset", "soft": "offset",
}  # fmt: skip
"""Learnable tensors of a linear and the learning rate that moves each."""
_CLIP_START = 4.0  # sigmoid(4) = 0.982 of the range (OmniQuant)
_INSIDE = 0.49  # of a level: how far from its code a weight may start
_STRETCH, _SHIFT = 1.2, -0.1  # of the rectified sigmoid (AdaRound: zeta 1.1, gamma -0.1)


class LinearLearner:
    """The learnables of one linear.

    Args:
        weight: ``[out, in]``, the checkpoint's, on the device of the passes; not changed.
        scheme: its storage.
        config: what is learned.
        generator: draws the low-rank factor; a CPU generator of this linear's own.
        anchor: the starting point, or ``None``: the ranges of the weight.
    """

    def __init__(
        self,
        weight: Tensor,
        scheme: Scheme,
        config: LearnedConfig,
        generator: torch.Generator,
        anchor: QuantizedWeight | None = None,
    ) -> None:
        self.base, self.scheme, self.config = weight, scheme, config
        self.out, self.width = weight.shape
        self.groups, self.size = scheme.groups(self.width), scheme.group_size or self.width
        self.anchor: Levels | None = None
        if anchor is not None:
            self._start_from(anchor)
        self.parameters: dict[str, Tensor] = {}
        self._make_parameters(generator)

    def _start_from(self, anchor: QuantizedWeight) -> None:
        grid = anchor.scaled_grid()
        scale, zero = grid.scale.to(self.base.device), grid.zero.to(self.base.device)
        chosen = anchor.dequantize().to(self.base.device)
        room = _INSIDE * scale.abs().repeat_interleave(self.size, 1)[:, : self.width]
        self.base = chosen + torch.clamp(self.base.float() - chosen, -room, room)
        self.anchor = Levels(scale[..., None], zero[..., None], 2**self.scheme.bits - 1)

    def _make_parameters(self, generator: torch.Generator) -> None:
        config, device = self.config, self.base.device
        if config.lora_rank:
            rank, bound = config.lora_rank, 1 / math.sqrt(self.width)  # Kaiming uniform with a = sqrt(5)
            drawn = torch.empty(rank, self.width).uniform_(-bound, bound, generator=generator)
            self._add("lora_a", drawn.to(device))
            self._add("lora_b", torch.zeros(self.out, rank, device=device))
        shape = (self.out, self.groups, 1)
        if config.clip != "off" and self.anchor is not None:
            self._add("factor", torch.full(shape, 0.0 if config.clip == "sigmoid" else 1.0, device=device))
        elif config.clip != "off":
            start = _CLIP_START if config.clip == "sigmoid" else 1.0
            for name in ("clip_low", "clip_high"):
                self._add(name, torch.full(shape, start, device=device))
        if config.rounding == "offset":
            self._add("offset", torch.zeros(self.out, self.width, device=device))
        elif config.rounding == "soft":
            with torch.no_grad():
                z = self.grouped(self.base.float())
                self._add("soft", _soft_start(z / self.levels(z).scale)[:, : self.width])

    def _add(self, name: str, value: Tensor) -> None:
        self.parameters[name] = value.detach().clone().requires_grad_()

    def grouped(self, values: Tensor) -> Tensor:
        """``[out, groups, size]``; a last group that is shorter is filled up with zeros, which change no range."""
        return functional.pad(values, (0, self.groups * self.size - self.width)).view(self.out, self.groups, self.size)

    def flat(self, values: Tensor) -> Tensor:
        """The inverse of `grouped`."""
        return values.reshape(self.out, -1)[:, : self.width]

    def target(self, scaled: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The weight before rounding, float32 ``[out, in]``."""
        weight = self.base.float()
        weight = weight if scaled is None else scaled(weight)
        if "lora_a" not in self.parameters:
            return weight
        a, b = self.parameters["lora_a"], self.parameters["lora_b"]
        return torch.addmm(weight, b, a, alpha=1 / len(a))

    def weight(
        self, scaled: Callable[[Tensor], Tensor] | None = None, share: float = 1.0, *, hard: bool = False
    ) -> Tensor:
        """The rounded weight, float32 ``[out, in]``, with gradients to everything that is learned.

        Args:
            scaled: applies channel scales to a float32 ``[out, in]``; share, hard: see `round_together`.
        """
        return round_together([self], [self.target(scaled)], share, hard=hard)[0]

    def levels(self, z: Tensor) -> Levels:
        """The grid of the groups ``z``."""
        return _levels_of(z, self.parameters, self.anchor, self.scheme, self.config)

    def offset(self, *, hard: bool = False) -> Tensor | None:
        """What rounding is moved by, as groups; ``hard``: with every choice of soft rounding made."""
        if "soft" in self.parameters:
            soft = soft_rounding(self.parameters["soft"])
            return self.grouped((soft >= 0.5).to(soft) if hard else soft)
        return self.grouped(self.parameters["offset"]) if "offset" in self.parameters else None

    def regularizer(self, power: float) -> Tensor | None:
        """``sum(1 - |2 s - 1|^power)`` of soft rounding: small where every weight has made its choice (AdaRound)."""
        if "soft" not in self.parameters:
            return None
        return (1 - (2 * soft_rounding(self.parameters["soft"]) - 1).abs().pow(power)).sum()

    @torch.no_grad()
    def fold(self, scaled: Callable[[Tensor], Tensor] | None = None) -> QuantizedWeight:
        """The result as codes and scales: dequantized, exactly what `weight` gives (soft rounding: its hard choice)."""
        z = self.grouped(self.target(scaled))
        levels, offset = self.levels(z), self.offset(hard=True)
        exact = z / levels.scale
        if self.config.rounding == "soft" and offset is not None:
            whole = exact.floor() + offset
        else:
            whole = (exact if offset is None else exact + offset).round()
        codes = self.flat((whole + levels.zero).clamp(0, levels.top)).to(torch.uint8)
        scale = levels.scale[..., 0].to(SCALE_DTYPES[self.scheme.scale_dtype])
        zero = {} if self.scheme.symmetric else {"zero": levels.zero[..., 0].to(torch.uint8)}
        return QuantizedWeight(codes, {"scale": scale, **zero}, self.scheme)

    @torch.no_grad()
    def keep_inside(self) -> None:
        """After a step: bounded factors back into their bounds."""
        if self.config.clip == "bounded":
            for name, high in (("clip_low", 1.0), ("clip_high", 1.0), ("factor", 2.0)):
                if name in self.parameters:
                    self.parameters[name].clamp_(1e-3 if name == "factor" else 0.0, high)


def soft_rounding(variable: Tensor) -> Tensor:
    """The rectified sigmoid of AdaRound, ``clamp(1.2 sigmoid(v) - 0.1, 0, 1)``."""
    return (torch.sigmoid(variable) * _STRETCH + _SHIFT).clamp(0, 1)


def _soft_start(exact: Tensor) -> Tensor:
    """The variable whose soft rounding gives the weight itself: ``h(v) = z / h - floor(z / h)``."""
    fraction = ((exact - exact.floor()) - _SHIFT) / _STRETCH
    return torch.logit(fraction, eps=1e-6).flatten(1)


def _levels_of(
    z: Tensor, found: dict[str, Tensor], anchor: Levels | None, scheme: Scheme, config: LearnedConfig
) -> Levels:
    """The grid of groups ``z [n, groups, size]`` with the learned tensors ``[n, groups, 1]`` of their clipping."""
    smooth = config.clip == "sigmoid"
    if anchor is not None:
        if "factor" not in found:
            return anchor
        factor = 2 * torch.sigmoid(found["factor"]) if smooth else found["factor"]
        return Levels(stored(anchor.scale * factor, scheme), anchor.zero, anchor.top)
    low, high = group_range(z)
    if "clip_low" in found:
        shrink = torch.sigmoid if smooth else torch.clone
        low, high = low * shrink(found["clip_low"]), high * shrink(found["clip_high"])
    return levels_of(low, high, scheme, zero_gradient=config.clip == "bounded")


def round_together(
    learners: Sequence[LinearLearner], targets: Sequence[Tensor], share: float = 1.0, *, hard: bool = False
) -> list[Tensor]:
    """Rounded weights float32 ``[out, in]`` of several linears.

    Groups of one kind are rounded in one go, whatever linear they are from: a step of a small model is bound by the
    number of kernels and not by their work.

    Args:
        learners: of one method; targets: what each rounds (`LinearLearner.target`); share: see `rounding.round_groups`.
        hard: with every choice of soft rounding made, as it will be stored.
    """
    kinds: dict[tuple[Scheme, int, int, bool], list[int]] = {}
    for number, one in enumerate(learners):
        # With a part of the groups left as it is, groups have a place in their row; otherwise they are all alike.
        place = one.groups if share < 1 else 1
        kinds.setdefault((one.scheme, one.size, place, one.anchor is None), []).append(number)
    found: dict[int, Tensor] = {}
    for (_, size, place, _), numbers in kinds.items():
        parts = [learners[number] for number in numbers]
        shape = (-1, place, size)
        z = _joined([one.grouped(targets[n]).reshape(shape) for one, n in zip(parts, numbers, strict=True)])
        rounded = _round_parts(parts, z, place, share, hard)
        sizes = [one.out * one.groups // place for one in parts]
        for one, number, part in zip(parts, numbers, rounded.split_with_sizes(sizes), strict=True):
            found[number] = one.flat(part)
    return [found[number] for number in range(len(learners))]


def _round_parts(parts: list[LinearLearner], z: Tensor, place: int, share: float, hard: bool) -> Tensor:
    first = parts[0]
    names: list[str] = [name for name in ("clip_low", "clip_high", "factor") if name in first.parameters]
    learned: dict[str, Tensor] = {
        name: _joined([one.parameters[name].reshape(-1, place, 1) for one in parts]) for name in names
    }
    anchor = None
    if first.anchor is not None:
        grids = [one.anchor for one in parts if one.anchor is not None]
        scale, zero = (_joined([part.reshape(-1, place, 1) for part in row]) for row in (
            [grid.scale for grid in grids], [grid.zero for grid in grids]
        ))  # fmt: skip
        anchor = Levels(scale, zero, first.anchor.top)
    levels = _levels_of(z, learned, anchor, first.scheme, first.config)
    found = [one.offset(hard=hard) for one in parts]
    offsets = [offset.reshape(-1, place, first.size) for offset in found if offset is not None]
    return round_groups(z, levels, _joined(offsets) if offsets else None, first.config.rounding, share)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
