"""Flags of ``ptq quantize`` that set an option of the method: ``--epochs 20`` is ``-O epochs=20``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import click

__all__ = ["METHOD_FLAGS", "MethodFlag", "method_flags"]

F = TypeVar("F", bound=Callable[..., Any])


class MethodFlag(NamedTuple):
    """A flag, the type and name of its value, and what it does."""

    flag: str
    kind: type
    metavar: str
    help: str


METHOD_FLAGS: dict[str, MethodFlag] = {
    "beam": MethodFlag("--beam", int, "K", "Candidates a row in coreq; 1 is greedy, the same as -O beam=K."),
    "schedule": MethodFlag(
        "--window-schedule",
        str,
        "NAME",
        "Methods that learn: which blocks are learned together: slider, expanding, contracting, fixed or single.",
    ),
    "epochs": MethodFlag("--epochs", int, "N", "Methods that learn: passes over the calibration data for each window."),
    "iters": MethodFlag("--iters", int, "N", "Methods that learn: steps for each window, unless --epochs is given."),
    "lora_rank": MethodFlag("--lora-rank", int, "N", "Rank of the learned change of a weight before it is rounded."),
    "intra": MethodFlag(
        "--intra",
        str,
        "auto|sweep|window|off",
        "Learn with half of the input channels rounded first: over the whole model, in each window, or not at all.",
    ),
    "lr_lora": MethodFlag("--lr-lora", float, "X", "Learning rate of the low-rank change."),
    "lr_clip": MethodFlag("--lr-clip", float, "X", "Learning rate of the range that weights are clipped to."),
    "lr_scale": MethodFlag("--lr-scale", float, "X", "Learning rate of the scaling of channels."),
    "lr_offset": MethodFlag("--lr-offset", float, "X", "Learning rate of offsets of the rounding (autoround)."),
    "grad_accum": MethodFlag("--grad-accum", int, "N", "Batches whose gradients make one step: less memory a batch."),
    "batch": MethodFlag("--train-batch", int, "N", "Sequences in a batch while learning; fewer need less memory."),
    "loss": MethodFlag(
        "--loss", str, "mse|huber|token", "Distance of a window's output from the full-precision model's."
    ),
    "init": MethodFlag("--init", str, "METHOD", "The rounding that learning starts from: none, rtn, gptq or coreq."),
}
"""By the name of the option."""


def method_flags(command: F) -> F:
    """A decorator: all of these flags, in the order of the table, given to the command under the options' names."""
    for option, (flag, kind, metavar, text) in reversed(METHOD_FLAGS.items()):
        command = click.option(flag, option, type=kind, metavar=metavar, help=text)(command)
    return command
