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
    "beam": MethodFlag(
        "--beam",
        int,
        "K",
        "Beam width of coreq: candidate roundings kept per row; 1 is greedy, 4 is slow: about four times the time. "
        "Same as -O beam=K.",
    ),
    "schedule": MethodFlag(
        "--window-schedule",
        str,
        "NAME",
        "Learned methods: which blocks are trained together: slider, expanding, contracting, fixed or single.",
    ),
    "epochs": MethodFlag("--epochs", int, "N", "Learned methods: training epochs per window of blocks."),
    "iters": MethodFlag(
        "--iters", int, "N", "Learned methods: optimizer steps per window of blocks, unless --epochs is given."
    ),
    "lora_rank": MethodFlag(
        "--lora-rank", int, "N", "Learned methods: rank of the low-rank weight update that is trained before rounding."
    ),
    "intra": MethodFlag(
        "--intra",
        str,
        "auto|sweep|window|off",
        "Learned methods: train with half the inputs quantized first: over the whole model (sweep), per window, "
        "or not at all (off).",
    ),
    "lr_lora": MethodFlag("--lr-lora", float, "X", "Learning rate of the low-rank weight update."),
    "lr_clip": MethodFlag("--lr-clip", float, "X", "Learning rate of the weight clipping range."),
    "lr_scale": MethodFlag("--lr-scale", float, "X", "Learning rate of the channel scales."),
    "lr_offset": MethodFlag("--lr-offset", float, "X", "Learning rate of the rounding offsets (autoround)."),
    "grad_accum": MethodFlag("--grad-accum", int, "N", "Gradient accumulation: batches per optimizer step."),
    "batch": MethodFlag("--train-batch", int, "N", "Training batch size in sequences; smaller needs less memory."),
    "loss": MethodFlag(
        "--loss", str, "mse|huber|token", "Training loss between a window's output and the full-precision output."
    ),
    "init": MethodFlag(
        "--init", str, "METHOD", "Method whose result training starts from: auto, none, rtn, gptq or coreq."
    ),
}
"""By the name of the option."""


def method_flags(command: F) -> F:
    """A decorator: all of these flags, in the order of the table, given to the command under the options' names."""
    for option, (flag, kind, metavar, text) in reversed(METHOD_FLAGS.items()):
        command = click.option(flag, option, type=kind, metavar=metavar, help=text)(command)
    return command
