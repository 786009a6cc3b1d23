"""How far a window's output is from the full model's, as a scalar to be learned on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Losses", "output_loss"]

_TINY = 1e-12
_MORE_ERROR = 1.01  # of another state's squared error that a better one may have: most of it may come with the input


class Losses(NamedTuple):
    """What decides between two states of a block or window, over the sequences that do.

    Args:
        loss: what is learned on.
        error: the squared error. A loss relative to every token's energy falls while the few tokens with huge
            activations, which all later blocks attend to, get worse.
    """

    loss: float
    error: float

    def better_than(self, other: Losses) -> bool:
        """Whether the loss is lower and the squared error not higher."""
        return self.loss < other.loss and self.error <= _MORE_ERROR * other.error


def output_loss(output: Tensor, target: Tensor, kind: str, corner: float = 1.0) -> Tensor:
    """The mean over tokens and channels, float32 ``[]``.

    Args:
        output, target: ``[sequences, tokens, width]`` (some models put a dimension before these).
        kind: ``mse``; ``huber``, squared up to ``corner`` and linear beyond, so that the few tokens with huge
            activations do not decide alone; ``token``: the squared error of a token over its own energy.
    """
    error = output.float() - target.float()
    if kind == "huber":
        return functional.huber_loss(error, torch.zeros_like(error), delta=corner)
    if kind == "token":
        return (error.square().mean(-1) / (target.float().square().mean(-1) + _TINY)).mean()
    return error.square().mean()
