"""How far a window's output is from the full model's, as a scalar to be learned on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["output_loss"]

_TINY = 1e-12


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
