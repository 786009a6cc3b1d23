"""The optimizers: torch's AdamW, and steps by the sign of the gradient; rates decay to zero or stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptq.learning.config import LearnedConfig

__all__ = ["Optimizer", "decayed"]


class Optimizer:
    """Moves tensors along gradients that it is given.

    Args:
        tensors: what is moved, with the learning rate of each.
        config: kind of steps, largest norm of the gradients.

    Rates live in tensors on the device, and state is made at once: a step can be part of a CUDA graph.
    """

    def __init__(self, tensors: Mapping[str, tuple[Tensor, float]], config: LearnedConfig) -> None:
        self._config = config
        self._tensors = [tensor for tensor, _ in tensors.values()]
        self._by_rate: dict[float, list[Tensor]] = {}
        for tensor, rate in tensors.values():
            self._by_rate.setdefault(rate, []).append(tensor)
        self._rates = {rate: torch.tensor(rate, device=found[0].device) for rate, found in self._by_rate.items()}
        self._adam = None if config.optimizer == "sign" else self._make_adam()

    def _make_adam(self) -> torch.optim.AdamW:
        on_gpu = self._tensors[0].is_cuda
        groups = [{"params": found, "lr": self._rates[rate]} for rate, found in self._by_rate.items()]
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=True, capturable=on_gpu)

    def set_decay(self, factor: float) -> None:
        """Rates are ``factor`` times those at the start from now on."""
        for rate, tensor in self._rates.items():
            tensor.fill_(rate * factor)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """One step along ``gradients``, in the order of the tensors; ``None`` leaves a tensor where it is."""
        given = [gradient for gradient in gradients if gradient is not None]
        if self._config.grad_clip and given:
            norm = torch.nn.utils.get_total_norm(given)
            torch._foreach_mul_(given, (self._config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        for tensor, gradient in zip(self._tensors, gradients, strict=True):
            tensor.grad = gradient
        if self._adam is not None:
            self._adam.step()
        else:
            self._sign_step()
        for tensor in self._tensors:
            tensor.grad = None

    def _sign_step(self) -> None:
        for rate, tensors in self._by_rate.items():
            moved = [tensor for tensor in tensors if tensor.grad is not None]
            if moved:
                signs = torch._foreach_sign([tensor.grad for tensor in moved if tensor.grad is not None])
                torch._foreach_mul_(signs, self._rates[rate])
                torch._foreach_sub_(moved, signs)

    def reset(self) -> None:
        """Forget all steps (after those that only warmed up a graph)."""
        if self._adam is not None:
            for state in self._adam.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()

    def state_bytes(self) -> int:
        """Bytes of what the optimizer keeps."""
        states: list[Any] = [] if self._adam is None else list(self._adam.state.values())
        return sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))


def decayed(config: LearnedConfig, step: int, steps: int) -> float:
    """The factor on learning rates at a step: 1 falling to ``1 / steps``, or 1."""
    return 1.0 if config.decay == "constant" else 1 - step / steps
