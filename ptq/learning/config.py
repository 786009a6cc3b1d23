"""What is learned, in which windows and how: one table of options that all learned methods share, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from calib.runner.window_schedule import SCHEDULES, ScheduleName, Window, make_windows
from ptq.errors import UsageError, unknown_name
from ptq.scheme import Scheme

__all__ = ["LearnedConfig", "Rates"]

Intra = Literal["auto", "sweep", "window", "off"]
Clip = Literal["sigmoid", "bounded", "off"]
Rounding = Literal["nearest", "offset", "soft"]
Switch = Literal["auto", "on", "off"]
Loss = Literal["mse", "huber", "token"]
Keep = Literal["end", "best"]
InitData = Literal["all", "training"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULES,
    "intra": ("auto", "sweep", "window", "off"),
    "clip": ("sigmoid", "bounded", "off"),
    "rounding": ("nearest", "offset", "soft"),
    "scaling": ("auto", "on", "off"),
    "loss": ("mse", "huber", "token"),
    "keep": ("end", "best"),
    "optimizer": ("adamw", "sign"),
    "decay": ("linear", "constant"),
    "init_data": ("all", "training"),
    "init": ("auto", "none", "rtn", "gptq", "coreq"),
}
_MOST_HELD_OUT = 0.5  # a fraction
_LOW_BITS = 2  # at which more is learned, and faster
_EPOCHS, _EPOCHS_LOW = 20, 60
_LR_LORA, _LR_LORA_LOW, _LR_CLIP, _LR_SCALE, _LR_SOFT = 3e-4, 1.5e-3, 3e-2, 3e-3, 1e-2


@dataclasses.dataclass(frozen=True)
class Rates:
    """Learning rates as they act (no factor is hidden in the batch), by what they move."""

    lora: float
    clip: float
    scale: float
    offset: float


@dataclasses.dataclass(frozen=True)
class LearnedConfig:
    """Args:
    schedule: windows of blocks: ``slider``, ``expanding``, ``contracting``, ``fixed``, ``single``.
    size: blocks in a window; step: blocks it moves by; edge: blocks that expand and contract.
    epochs: passes over the calibration data a window, all stages together; 0 leaves it to ``iters``.
    iters: steps a window, all stages together; 0, without epochs, is 60 epochs at 2 bits and 20 above.
    batch: sequences in a step; grad_accum: steps whose gradients are added up.
    intra: first only the first input channels are quantized: in a ``sweep`` over the whole model, in every ``window``,
        or ``off``; ``auto`` is a sweep, but off with a starting point, which would be forgotten; stages: in how many.
    lora_rank: rank of what is added to weights before rounding; 0 is off.
    clip: learned ranges: ``sigmoid`` factors, ``bounded`` factors, ``off``.
    rounding: ``nearest``, a learned ``offset`` of at most half a level, or ``soft`` (rectified sigmoid).
    scaling: channel scales folded into neighbours: ``auto`` where activations are quantized and a block's structure
        allows it, ``on`` (an error where it does not), ``off``.
    lr_lora, lr_clip, lr_scale, lr_offset: learning rates; 0 is the method's own.
    optimizer: ``adamw`` or ``sign``; decay: ``linear`` to zero or ``constant``; grad_clip: norm, 0 is off.
    loss: ``mse``, ``huber``, or ``token``, squared error relative to the token's energy.
    keep: what a stage ends with: its ``end``, or the step with the ``best`` loss of its own batch (AutoRound).
    init: a method whose result is learned on: ``none``, ``rtn``, ``gptq``, ``coreq``; ``auto`` is coreq, or rtn in
        blocks where that is better on the sequences held out, and none where inputs are rounded, too.
    init_data: what that method reads: ``all`` sequences, so that a start that stays is what the method gives alone
        (learning must beat it on sequences that it was fitted to), or ``training``, without those held out.
    holdout: fraction of the calibration sequences, at least two, that nothing is learned on: they decide what is kept;
        0 is off.
    max_passes: steps of a window are cut to so many passes over what is learned on; 0 is off.
    """

    schedule: ScheduleName = "slider"
    size: int = 2
    step: int = 1
    edge: int = 4
    epochs: int = 0
    iters: int = 0
    batch: int = 4
    grad_accum: int = 1
    intra: Intra = "auto"
    stages: int = 2
    lora_rank: int = 4
    clip: Clip = "sigmoid"
    rounding: Rounding = "nearest"
    scaling: Switch = "auto"
    lr_lora: float = 0.0
    lr_clip: float = 0.0
    lr_scale: float = 0.0
    lr_offset: float = 0.0
    optimizer: Literal["adamw", "sign"] = "adamw"
    decay: Literal["linear", "constant"] = "linear"
    grad_clip: float = 1.0
    loss: Loss = "mse"
    keep: Keep = "end"
    init: str = "auto"
    init_data: InitData = "all"
    holdout: float = 0.125
    max_passes: int = 12

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown_name(name.replace("_", " "), str(getattr(self, name)), choices)
        for name, low, high in (
            ("size", 1, 10**4), ("step", 1, 10**4), ("edge", 0, 10**4), ("epochs", 0, 10**5), ("iters", 0, 10**7),
            ("batch", 1, 10**4), ("grad_accum", 1, 10**4), ("stages", 1, 64), ("lora_rank", 0, 4096),
            ("max_passes", 0, 10**5),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} is a whole number from {low} to {high}, got {getattr(self, name)!r}.")
        for name in ("lr_lora", "lr_clip", "lr_scale", "lr_offset", "grad_clip"):
            if not 0 <= getattr(self, name) < 1e3:
                raise UsageError(f"{name} is 0 (the default) or a number below 1000, got {getattr(self, name)!r}.")
        if not 0 <= self.holdout <= _MOST_HELD_OUT:
            raise UsageError(f"holdout is a fraction from 0 (off) to {_MOST_HELD_OUT}, got {self.holdout!r}.")
        if not (self.lora_rank or self.clip != "off" or self.rounding != "nearest" or self.scaling != "off"):
            raise UsageError("nothing is left to learn: lora_rank 0, clip off, rounding nearest, scaling off.")

    def windows(self, blocks: int) -> tuple[Window, ...]:
        """The schedule for a model of so many blocks.

        Raises:
            UsageError: the windows do not fit the model.
        """
        return make_windows(self.schedule, blocks, size=self.size, step=self.step, edge=self.edge)

    @property
    def sweeps(self) -> tuple[tuple[float, ...], ...]:
        """The shares of input channels that are quantized: an entry a sweep over the model, in it a share a stage."""
        shares = tuple((n + 1) / self.stages for n in range(self.stages))
        if self.intra == "off" or (self.intra == "auto" and self.init not in ("none", "auto")):
            return ((1.0,),)
        return (shares,) if self.intra == "window" else tuple((share,) for share in shares)

    def steps(self, batches: int, bits: Iterable[int]) -> int:
        """Optimizer steps of one stage of one window.

        Args:
            batches: to learn on, of one process.
            bits: of the schemes in use.
        """
        stages = sum(len(sweep) for sweep in self.sweeps)
        pass_ = batches / self.grad_accum
        if self.iters and not self.epochs:
            total: float = min(self.iters, self.max_passes * pass_) if self.max_passes else self.iters
        else:
            total = (self.epochs or (_EPOCHS_LOW if min(bits) <= _LOW_BITS else _EPOCHS)) * pass_
        return max(1, round(total / stages))

    def rates(self, scheme: Scheme, steps: int) -> Rates:
        """Learning rates for a linear with ``scheme``, for so many steps a stage."""
        low = scheme.bits <= _LOW_BITS
        if self.optimizer == "sign":  # the sum over a linear decay is half a level (AutoRound)
            lora, clip, scale, offset = 1.0 / steps * 0.05, 1.0 / steps, 1.0 / steps, 1.0 / steps
        else:
            lora, clip, scale, offset = _LR_LORA_LOW if low else _LR_LORA, _LR_CLIP, _LR_SCALE, _LR_SOFT
        return Rates(self.lr_lora or lora, self.lr_clip or clip, self.lr_scale or scale, self.lr_offset or offset)
