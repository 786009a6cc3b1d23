"""HAWQ with Hessian-vector products: Hutchinson's trace (V2) and the top eigenvalue by power iteration (V1).

The loss is the KL divergence from the model itself, per token: its gradient vanishes and its Hessian is the Fisher
matrix. A product with the Hessian H is the gradient of ``g . v``, a backward pass through a backward pass:

    hawq-hvp   mean over probes z (random signs) of z . Hz, whose mean is Tr H     score  1/2 Tr(H)/n |D|^2
    hawq-eig   v <- Hv / |Hv|, lambda = v . Hv                                     score  1/2 lambda |D|^2

All linears share one set of probes: products between different linears have mean zero. Eigenvalues are found linear by
linear, on the graph of one batch. V1 orders linears by lambda / n, which is among the details.

The graph of the first gradients is kept: memory is two to three times that of training, and the model runs in float32
with eager attention, because the fused kernels have no second derivative. For larger models take ``hawq``, which
estimates the same trace from one plain backward pass.

Sources: HAWQ (arXiv 1905.03696), HAWQ-V2 (arXiv 1911.03852), PyHessian for iterations and tolerance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from calib.checkpoint.resident import ResidentSource
from calib.model.structure import linear_weight
from calib.runner.forward import move_to
from ptq.allocation.scores.base import Context, Score, ScoreValues
from ptq.errors import ModelError

__all__ = ["HAWQ_EIG", "HAWQ_HVP"]

_TOLERANCE = 1e-3  # relative change of an eigenvalue at which power iteration stops
_CUT_OFF = ("DelayedError", "Error", "NotImplemented")  # autograd's nodes of what has no derivative
_EIGEN_TOKENS = 1024  # of the one batch whose graph is kept


@contextlib.contextmanager
def _trainable(context: Context) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """The whole model in float32 with eager attention, and the weights that are scored, with gradients."""
    resident = ResidentSource(context.source)
    model: Any = context.source.skeleton
    before = model.config._attn_implementation
    try:
        move_to(model, context.device, torch.float32)
        model.set_attn_implementation("eager")
        weights = {name: model.get_submodule(name).weight.requires_grad_() for name in context.linears}
        yield model, weights
    finally:
        model.set_attn_implementation(before)
        resident.close()


def _gradient(model: Any, tokens: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient, with its graph, of the KL divergence per token from the model as it is.

    It is ``None`` for a weight that no token reached, as those of an idle expert: its Hessian is zero.
    """
    with _second_derivatives(model):
        logprobs = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), -1)
        fixed = logprobs.detach()
        loss = (fixed.exp() * (fixed - logprobs)).sum(-1).mean()
        found = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        _check_graph(found)
        return found


def _check_graph(gradient: Sequence[Tensor | None]) -> None:
    """Check that no operation of a gradient is cut off from what it was computed from.

    Autograd itself notices only where nothing else leads to a weight; otherwise a term of the Hessian would be lost.

    Raises:
        RuntimeError: one is, as those of kernels that are marked to be differentiable once.
    """
    waiting = [own.grad_fn for own in gradient if own is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if type(node).__name__.removesuffix("Backward") in _CUT_OFF:
            raise RuntimeError("an operation can be differentiated only once")
        new = {after for after, _ in node.next_functions} - seen
        seen |= new
        waiting += new


@contextlib.contextmanager
def _second_derivatives(model: Any) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(
            f"{type(model).__name__} has no second derivative, which Hessian-vector products need ({error}). Attention "
            f"must be eager (attn_implementation='eager'), which was asked for: the model's own kernels do not support "
            f"it. Take --score hawq, which estimates the same trace from plain gradients."
        ) from error


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(like.dtype).mul_(2).sub_(1)


def _hutchinson(context: Context) -> ScoreValues:
    assert context.tokens is not None
    generator = torch.Generator(context.device).manual_seed(context.seed)
    with torch.enable_grad(), _trainable(context) as (model, weights):
        draws: list[list[float]] = []
        context.steps.begin(f"sequences: {context.probes} Hessian-vector products each", len(context.tokens))
        for row in context.tokens:
            gradient = _gradient(model, row[None].to(context.device), list(weights.values()))
            reached = [own for own in gradient if own is not None]
            for probe in range(context.probes):
                signs = [_signs(weight, generator) for weight in weights.values()]
                with _second_derivatives(model):
                    products = torch.autograd.grad(
                        reached,
                        list(weights.values()),
                        [sign for sign, own in zip(signs, gradient, strict=True) if own is not None],
                        retain_graph=probe + 1 < context.probes,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                pairs = zip(signs, products, strict=True)
                draws.append([float((sign * product).sum()) for sign, product in pairs])
            context.steps("probes")
        values = torch.tensor(draws, dtype=torch.float64)
        errors = values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(values[0], torch.nan)
        traces = {n: (float(t), float(e)) for n, t, e in zip(weights, values.mean(0), errors, strict=True)}
        table = _table(context, model, {name: trace / weights[name].numel() for name, (trace, _) in traces.items()})
    details = {name: {"trace": trace, "standard_error": error} for name, (trace, error) in traces.items()}
    return ScoreValues(table, details=details)


def _power_iteration(context: Context) -> ScoreValues:
    assert context.tokens is not None
    rows = max(1, _EIGEN_TOKENS // context.tokens.shape[1])
    generator = torch.Generator(context.device).manual_seed(context.seed)
    details = {}
    with torch.enable_grad(), _trainable(context) as (model, weights):
        tokens = context.tokens[:rows].to(context.device)
        context.steps.begin("linears: power iteration", len(weights))
        gradient = _gradient(model, tokens, list(weights.values()))
        for (name, weight), own in zip(weights.items(), gradient, strict=True):
            value, rounds = 0.0, 0
            if own is not None:
                with _second_derivatives(model):
                    value, rounds = _top_eigenvalue(own, weight, context.probes, generator)
            details[name] = {"eigenvalue": value, "order": value / weight.numel(), "iterations": float(rounds)}
            context.steps(name)
        del gradient
        table = _table(context, model, {name: row["eigenvalue"] for name, row in details.items()})
    used = f"eigenvalues are of the first {tokens.numel()} tokens"
    slow = sum(row["iterations"] >= context.probes for row in details.values())
    notes = (used, f"{slow} power iterations had not settled after {context.probes} rounds") if slow else (used,)
    return ScoreValues(table, notes=notes, details=details)


def _top_eigenvalue(gradient: Tensor, weight: Tensor, rounds: int, generator: torch.Generator) -> tuple[float, int]:
    """The largest eigenvalue of one weight's Hessian, and the iterations it took."""
    vector = torch.randn(weight.shape, generator=generator, device=weight.device)
    vector /= vector.norm()
    value = 0.0
    for number in range(1, rounds + 1):
        (product,) = torch.autograd.grad(gradient, weight, vector, retain_graph=True)
        last, value = value, float((vector * product).sum())
        norm = product.norm()
        if not bool(norm > 0) or abs(value - last) <= _TOLERANCE * abs(value):
            return value, number
        vector = product / norm
    return value, rounds


def _table(context: Context, model: Any, curvature: dict[str, float]) -> dict[str, list[float]]:
    """Half of a curvature times every candidate's squared error."""
    table = {}
    with torch.no_grad():
        for name, value in curvature.items():
            weight = linear_weight(model.get_submodule(name)).detach().float()
            table[name] = [0.5 * value * float(error.square().sum()) for error in context.errors(weight)]
    return table


HAWQ_HVP = Score(
    "hawq-hvp",
    "HAWQ-V2: mean trace of the Hessian (Hutchinson, Hessian-vector products) x squared error",
    "--probes double backward passes per sequence; the whole model in memory, in float32, with its graph",
    "nats",
    True,
    _hutchinson,
)
HAWQ_EIG = Score(
    "hawq-eig",
    "HAWQ-V1: top eigenvalue of the Hessian (power iteration) x squared error",
    "up to --probes double backward passes per linear on the first 1024 tokens; memory as hawq-hvp",
    "relative",
    True,
    _power_iteration,
)
