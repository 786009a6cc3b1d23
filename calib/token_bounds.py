"""Statistics that a few tokens with huge inputs do not decide alone.

In many models one or two tokens of a sequence, mostly the first, have inputs of single linears that are hundreds of
times as large as all others. Sums of squares over tokens are then sums over these: 0.1 % of the tokens hold 99 % of the
energy, and what is said of the inputs' mismatch is said of these tokens. Huber's weights bound that: a token's squares
count in full up to a norm of c, and c / norm times beyond, so that they grow with the norm and not with its square.

    weight = min(1, c / max(|x|, |x~|)),    c = median over the tokens of the batch

Values are multiplied by the weight's root, rounded up to a power of two: exact in every dtype, so nothing is lost of
the difference between the two streams, and a token below 4 c is not changed at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bound_tokens"]


def bound_tokens(quantized: Tensor, full: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Inputs with the roots of Huber's weights on their tokens.

    Args:
        quantized: ``[sequences, tokens, n]`` in the model quantized so far.
        full: The same tokens in the full-precision model.
    """
    norms = torch.linalg.vector_norm(quantized.float(), dim=-1, keepdim=True)
    if full is not None:
        norms = torch.maximum(norms, torch.linalg.vector_norm(full.float(), dim=-1, keepdim=True))
    median = norms.flatten().median()
    if not bool(median > 0):
        return quantized, full
    exponent = torch.ceil(torch.log2(median / norms.clamp(min=median)) / 2)
    factor = torch.exp2(exponent)
    return quantized * factor.to(quantized.dtype), None if full is None else full * factor.to(full.dtype)
