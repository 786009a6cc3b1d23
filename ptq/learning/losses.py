"""How far a window's output is from the full model's, as a scalar to be learned on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["output_loss"]

_TINY = 1e-12


def output_loss(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """The mean over tokens and channels, float32 ``[]``.

    Args:
        output, target: ``[sequences, tokens, width]`` (some models put a dimension before these).
        kind: ``mse``; ``huber`` with its corner at twice the mean absolute error of the batch, so that the few tokens
            with huge activations do not decide alone; ``token``: the squared error of a token over its own energy.
    """
    error = output.float() - target.float()
    if kind == "huber":
        corner = 2 * error.detach().abs().mean() + _TINY
        return functional.huber_loss(error / corner, torch.zeros_like(error))
    if kind == "token":
        return (error.square().mean(-1) / (target.float().square().mean(-1) + _TINY)).mean()
    return error.square().mean()
