"""The KL divergence that an allocation costs, measured block by block on tokens that no score has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calib.checkpoint.reader import ModelSource
from calib.gradients import GradientPasses, NewStore
from calib.model.structure import find_linears, linear_weight, set_linear_weight
from ptq.allocation.problem.candidates import Candidate, rounding_errors

__all__ = ["measure_kl", "token_kl"]


def token_kl(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) of every token, float32 ``[tokens]``, from logits ``[tokens, vocabulary]``."""
    reference, logprobs = torch.log_softmax(full.float(), -1), torch.log_softmax(other.float(), -1)
    return (reference.exp() * (reference - logprobs)).sum(-1)


def measure_kl(
    source: ModelSource,
    tokens: Tensor,
    chosen: Mapping[str, Candidate],
    *,
    device: torch.device,
    dtype: torch.dtype,
    new_store: NewStore,
    on_step: Callable[[str], object] = lambda _: None,
) -> NDArray[np.float64]:
    """KL per token ``[sequences, tokens]`` of the model whose linears are rounded by the stand-in method.

    Args:
        source: the model.
        tokens: int64 ``[sequences, seqlen]``.
        chosen: by full name of a linear, its format; others stay as they are.
        device: where to work.
        dtype: of the passes.
        new_store: makes stores of hidden states.
        on_step: called after every block.
    """

    def edit(name: str, block: nn.Module) -> None:
        for linear, module in find_linears(block).items():
            candidate = chosen.get(f"{name}.{linear}")
            if candidate is not None and candidate.scheme is not None:
                weight = linear_weight(module).detach().float()
                (error,) = rounding_errors(weight, (candidate,))
                set_linear_weight(module, (weight + error).to(dtype))

    def passes(label: str, change: Callable[[str, nn.Module], object]) -> GradientPasses:
        return GradientPasses(
            source,
            tokens,
            device=device,
            dtype=dtype,
            new_store=lambda store: new_store(f"{label}-{store}"),
            on_block=on_step,
            edit=change,
            keep_all=False,
        )

    full, rounded = passes("full", lambda _, __: None), passes("rounded", edit)
    try:
        full.forward()
        rounded.forward()
        rows = []
        with full.head(), torch.no_grad():
            for number, sequence in full.sequences():
                kl = token_kl(full.logits(number, sequence), rounded.logits(number, sequence))
                rows.append(kl.double().cpu().numpy())
    finally:
        full.close()
        rounded.close()
    return np.stack(rows)
