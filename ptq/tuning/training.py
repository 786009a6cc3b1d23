"""The loop: norms learn to give the full-precision model's distribution of the next token.

Everything else, packed weights too, stays as it is. The loss is the KL divergence from the full model to the quantized
one, at every token. Blocks are recomputed in the backward pass, so that one block's weights are unpacked at a time, and
sequences pass one by one.

Source: Norm Tweaking (arXiv 2309.02784) for the parameters, there with a loss on every block's output; QuIP# (arXiv
2402.04396), section 5, for tuning end to end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from calib.model.structure import find_blocks
from calib.precision import strict_float32
from ptq.errors import NumericalError, UsageError
from ptq.tuning.config import TuneConfig

__all__ = ["Learned", "norm_parameters", "train"]

_TOKENS = 512  # whose logits are compared at a time
_WARM_UP = 10  # steps


@dataclasses.dataclass(frozen=True)
class Learned:
    """What tuning found.

    Args:
        values: Of every tuned parameter, by its name in the model, in the dtype that it is stored in.
        before: Mean KL in nats per token of the sequences held out, of the model as it was.
        after: The same of what is kept; not above ``before``.
        steps: Of the optimizer until what is kept; 0 if nothing lowered the loss.
        held_out: Sequences held out.
    """

    values: dict[str, Tensor]
    before: float
    after: float
    steps: int
    held_out: int


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Gains and biases of all norms of a model, by full name.

    A norm is a module without modules in it, whose parameters are vectors, and that is no linear: that holds of
    RMSNorm and LayerNorm whatever a family calls its own.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or any(module.children()) or isinstance(module, nn.Linear):
            continue
        if all(parameter.ndim == 1 and parameter.is_floating_point() for parameter in own.values()):
            found |= {f"{name}.{leaf}": parameter for leaf, parameter in own.items()}
    return found


def train(
    model: Any,
    reference: Any,
    tokens: Tensor,
    config: TuneConfig,
    *,
    stored: Mapping[str, torch.dtype],
    on_progress: Callable[[int, int, float], object] = lambda done, steps, loss: None,
) -> Learned:
    """Tune the norms of ``model`` in place, which is left with what is kept.

    Args:
        model: The quantized one, on its device.
        reference: The full-precision one.
        tokens: int64 ``[sequences, length]``.
        config: Options.
        stored: Parameters that may be tuned, by name, and the dtype that they are stored in: what is kept is judged
            after rounding to it.
        on_progress: Given the steps done, all steps, and the lowest loss of what is held out.

    Raises:
        UsageError: Too few sequences, or no norms.
        NumericalError: The loss is not finite before anything is learned.
    """
    count = max(2, round(len(tokens) * config.held_out))
    if len(tokens) < count + 1:
        raise UsageError(f"tuning needs at least 3 sequences, two of which are held out; got {len(tokens)}.")
    tuned = {name: value for name, value in norm_parameters(model).items() if name in stored}
    if not tuned:
        raise UsageError(f"{type(model).__name__} has no norms that could be tuned.")
    with _only(model, tuned.values()), _recomputed(model), strict_float32():
        return _Loop(model, reference, tokens[:-count], tokens[-count:], tuned, stored, config).run(on_progress)


class _Loop:
    """One run; see `train`."""

    def __init__(
        self,
        model: Any,
        reference: Any,
        learned_from: Tensor,
        held_out: Tensor,
        tuned: Mapping[str, nn.Parameter],
        stored: Mapping[str, torch.dtype],
        config: TuneConfig,
    ) -> None:
        self.model, self.reference, self.config = model, reference, config
        self.learned_from, self.held_out = learned_from, held_out
        self.tuned, self.stored = tuned, stored

    def run(self, on_progress: Callable[[int, int, float], object]) -> Learned:
        config = self.config
        order = self._order()
        steps = math.ceil(len(order) / config.batch)
        values = list(self.tuned.values())
        optimizer = torch.optim.AdamW(values, lr=config.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        before = self._held_out_loss()
        if not math.isfinite(before):
            raise NumericalError(f"the KL divergence is {before} before anything is tuned: the result is damaged.")
        lowest, kept, kept_step = before, self._rounded(), 0
        every = max(1, steps // config.checks)
        on_progress(0, steps, lowest)
        for step in range(steps):
            for sequence in order[step * config.batch : (step + 1) * config.batch]:
                loss = self._loss(self.learned_from[sequence : sequence + 1]) / config.batch
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if (step + 1) % every and step + 1 < steps:
                on_progress(step + 1, steps, lowest)
                continue
            rounded = self._rounded()
            with self._values(rounded):
                loss_now = self._held_out_loss()
            if loss_now < lowest:
                lowest, kept, kept_step = loss_now, rounded, step + 1
            on_progress(step + 1, steps, lowest)
        self._put(kept)
        return Learned(kept, before, lowest, kept_step, len(self.held_out))

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.config.seed)
        epochs = [torch.randperm(len(self.learned_from), generator=generator) for _ in range(self.config.epochs)]
        return [int(number) for number in torch.cat(epochs)]

    def _rounded(self) -> dict[str, Tensor]:
        return {name: value.detach().to(self.stored[name]) for name, value in self.tuned.items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.tuned[name].copy_(value)

    @contextmanager
    def _values(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the model has these values."""
        saved = {name: value.detach().clone() for name, value in self.tuned.items()}
        self._put(values)
        try:
            yield
        finally:
            self._put(saved)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        losses = [float(self._loss(self.held_out[i : i + 1])) for i in range(len(self.held_out))]
        return sum(losses) / len(losses)

    def _loss(self, tokens: Tensor) -> Tensor:
        """Mean KL in nats per token of a sequence ``[1, length]``."""
        with torch.no_grad():
            wanted = _logits(self.reference, tokens)
        found = _logits(self.model, tokens)
        parts = [
            checkpoint(_divergence, found[i : i + _TOKENS], wanted[i : i + _TOKENS], use_reentrant=False)
            for i in range(0, len(found), _TOKENS)
        ]
        return torch.stack(parts).sum() / len(found)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    """``[length, vocabulary]``."""
    device = model.get_input_embeddings().weight.device
    logits: Tensor = model(input_ids=tokens.to(device), use_cache=False).logits[0]
    return logits


def _divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """The sum over tokens of KL(wanted, found)."""
    target = wanted.to(found.device).float().log_softmax(-1)
    return functional.kl_div(found.float().log_softmax(-1), target, log_target=True, reduction="sum")


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine, as a share of the learning rate."""
    return min(1.0, (step + 1) / min(_WARM_UP, steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@contextmanager
def _only(model: nn.Module, tuned: Any) -> Iterator[None]:
    """Inside, these parameters alone have gradients."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    for parameter in tuned:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def _recomputed(model: Any) -> Iterator[None]:
    """Inside, blocks are run again in the backward pass instead of keeping what they unpacked."""
    blocks: Sequence[Any] = [model.get_submodule(name) for name in find_blocks(model)]
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
