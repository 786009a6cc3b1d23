"""The KL divergence that an allocation costs, measured block by block on tokens that no score has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calib.checkpoint.reader import ModelSource
from calib.gradients import GradientPasses, NewStore
from calib.model.structure import end_modules, find_linears, linear_weight, set_linear_weight
from ptq.allocation.problem.candidates import Candidate, rounding_errors
from ptq.allocation.progress import Steps
from ptq.pipeline.preparation.schemes.outside import outside_modules

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
    steps: Steps | None = None,
) -> NDArray[np.float64]:
    """KL per token ``[sequences, tokens]`` of the model whose linears are rounded by the stand-in method.

    Args:
        source: the model.
        tokens: int64 ``[sequences, seqlen]``.
        chosen: by full name of a linear, its format; others stay as they are.
        device: where to work.
        dtype: of the passes.
        new_store: makes stores of hidden states.
        steps: told of both passes and their blocks.
    """

    steps = steps or Steps()

    def edit(name: str, block: nn.Module) -> None:
        for linear, module in find_linears(block).items():
            candidate = chosen.get(f"{name}.{linear}")
            if candidate is not None and candidate.scheme is not None:
                weight = linear_weight(module).detach().float()
                (error,) = rounding_errors(weight, (candidate,))
                set_linear_weight(module, (weight + error).to(dtype))

    ends = {
        name: one for name, one in chosen.items() if one.scheme is not None and name in outside_modules(source.skeleton)
    }

    def edit_ends(model: nn.Module) -> None:
        for name, candidate in ends.items():
            _round_end(model, name, candidate, dtype)

    def passes(
        label: str, change: Callable[[str, nn.Module], object], change_ends: Callable[[nn.Module], object]
    ) -> GradientPasses:
        return GradientPasses(
            source,
            tokens,
            device=device,
            dtype=dtype,
            new_store=lambda store: new_store(f"{label}-{store}"),
            on_block=steps,
            edit=change,
            edit_outside=change_ends,
            keep_all=False,
        )

    full = passes("full", lambda _, __: None, lambda _: None)
    rounded = passes("rounded", edit, edit_ends)
    try:
        steps.begin("blocks: forward pass of the full model", len(full.block_names))
        full.forward()
        steps.begin("blocks: rounding and forward pass", len(rounded.block_names))
        rounded.forward()
        rows = [kl.double().cpu().numpy() for kl in _by_sequence(full, rounded, alike=not ends)]
    finally:
        full.close()
        rounded.close()
    return np.stack(rows)


def _by_sequence(full: GradientPasses, rounded: GradientPasses, *, alike: bool) -> Iterator[Tensor]:
    """KL per token of every sequence; where the heads are alike, one is loaded for both models."""
    with torch.no_grad():
        if alike:
            with full.head():
                for place in full.sequences():
                    yield token_kl(full.logits(*place), rounded.logits(*place))
            return
        for place in full.sequences():
            with full.head():
                reference = full.logits(*place)
            with rounded.head():
                yield token_kl(reference, rounded.logits(*place))


def _round_end(model: nn.Module, name: str, candidate: Candidate, dtype: torch.dtype) -> None:
    """Round the embedding or the head, and with it what shares its weight."""
    old = model.get_submodule(name).weight
    assert isinstance(old, Tensor)
    (error,) = rounding_errors(old.detach().float(), (candidate,))
    new = nn.Parameter((old.detach().float() + error).to(dtype), requires_grad=False)
    for module in end_modules(model):
        if module is not None and isinstance(module.weight, Tensor) and module.weight.data_ptr() == old.data_ptr():
            module._parameters["weight"] = new
