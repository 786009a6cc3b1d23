"""Does a module of fused experts compute what its split form computes? Asked of a small copy with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["PROBE_EXPERTS", "Accumulation", "find_accumulation"]

PROBE_EXPERTS = 6

Accumulation = Literal["hidden", "weights", "float32"]
"""The dtype in which the outputs of a token's experts are added up: the hidden state's, the routing weights', ..."""


@torch.no_grad()
def find_accumulation(
    fused: nn.Module, shapes: Mapping[str, tuple[int, ...]], width: int, split: Callable[[nn.Module], nn.Module]
) -> Accumulation | None:
    """Run a small copy of ``fused`` beside its split form.

    Args:
        fused: decorated by transformers' ``use_experts_implementation``; its parameters are not touched.
        shapes: of the copy's parameters, for `PROBE_EXPERTS` experts.
        width: of a token.
        split: makes the split form of the copy.

    Returns:
        How the module adds up; ``None`` if it does not compute the same or cannot be run like this.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    probe = _copy_with(fused, {name: 2 * draw(*shape) for name, shape in shapes.items()})
    hidden, weights, index = draw(7, width), draw(7, 2), draw(7, PROBE_EXPERTS).argsort(1)[:, :2]
    try:
        same = torch.allclose(split(probe)(hidden, index, weights), _eager(probe, hidden, index, weights), 1e-4, 1e-4)
        wide = [_adds_wide(probe, hidden[:1], dtype) for dtype in (torch.bfloat16, torch.float32)]
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return None  # modelling code that wants to be called in another way
    if not same:
        return None
    return "float32" if wide[0] else "weights" if wide[1] else "hidden"


def _copy_with(fused: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A copy that shares everything but its parameters with ``fused``."""
    other = copy.copy(fused)
    other.__dict__["_parameters"] = {name: nn.Parameter(value) for name, value in parameters.items()}
    other.num_experts = PROBE_EXPERTS  # type: ignore[assignment]
    return other


def _eager(fused: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The forward that the class was written with: the decorator replaces it by one that may take another way."""
    output: Tensor = type(fused).forward.__wrapped__(fused, hidden, index, weights)  # type: ignore[attr-defined]
    return output


def _adds_wide(probe: nn.Module, hidden: Tensor, weights_dtype: torch.dtype) -> bool:
    """Whether the experts' outputs for a bfloat16 token are added up in more than bfloat16.

    All experts are made the same, with output y. ``1024 y + 2 y`` is ``1024 y`` again in bfloat16, but not in float32.
    """
    first = {name: value[:1].expand(value.shape).bfloat16() for name, value in probe.named_parameters()}
    same = _copy_with(probe, first)
    token, index = hidden.bfloat16(), torch.arange(PROBE_EXPERTS, device="cpu")[None]  # [1, H], [1, experts]
    weights = torch.tensor([[1024] + [2] * (PROBE_EXPERTS - 1)], dtype=weights_dtype, device="cpu")
    alone = _eager(same, token, index[:, :1], weights[:, :1])
    return not torch.equal(_eager(same, token, index, weights), alone)
