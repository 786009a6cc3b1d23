"""Second-order scores from one plain backward pass per sequence, with labels drawn from the model.

The gradient of a sequence's loss by a weight is ``sum_t g_t x_t^T``; with labels drawn from the model its covariance is
the Fisher matrix F, the Hessian of the KL divergence. Per token of T, for the error D that a format adds to a weight:

    fisher      1/(2T) sum_seq sum_oi (G^T X)_oi^2 D_oi^2        F's diagonal
    out-fisher  1/(2T) sum_t (g_t . D x_t)^2                     all of F within a token
    hawq        1/(2T) sum_seq |G^T X|^2 / n  |D|^2              F's mean trace (HAWQ-V2)
    modelopt    1/(2T) sum_t sum_o g_to^2 (D x_t)_o^2            as published: labels are the text's next tokens

Nothing of the model's size is stored: a block's squared gradients are contracted with the errors of all formats before
the next block is loaded.

Sources: SqueezeLLM (arXiv 2306.07629) for the diagonal; HAWQ-V2 (arXiv 1911.03852) for the trace; the "gradient" method
of AutoQuantize in NVIDIA Model Optimizer for modelopt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calib.gradients import BlockGradients, GradientPasses
from calib.model.structure import linear_weight
from ptq.allocation.scores.base import Context, Score, ScoreValues

__all__ = ["FISHER", "HAWQ", "MODELOPT", "OUT_FISHER", "squared_gradient"]

_BY_TOKEN = (
    "experts: squared gradients are summed token by token, because their rows come without the sequence they belong to"
)


def squared_gradient(calls: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The square of a weight's gradient, summed over sequences, float32 ``[out, in]``.

    Args:
        calls: inputs and output gradients of every call in one batch, ``[sequences, tokens, n]``. Rows that come
            without their sequence (``[rows, n]``) count as sequences of one token.
    """
    inputs, gradients = calls[0]
    if any(x.ndim != 3 or len(x) != len(inputs) for x, _ in calls):
        pairs = [(x.flatten(0, -2).float().square(), g.flatten(0, -2).float().square()) for x, g in calls]
        return sum((g.T @ x for x, g in pairs[1:]), pairs[0][1].T @ pairs[0][0])
    total = torch.zeros(gradients.shape[-1], inputs.shape[-1], device=inputs.device)
    for sequence in range(len(inputs)):
        whole = sum((g[sequence].T @ x[sequence]).float() for x, g in calls)
        assert isinstance(whole, Tensor)
        total.addcmul_(whole, whole)
    return total


def _gradients(context: Context, visit: Callable[[BlockGradients], None], *, sampled: bool = True) -> GradientPasses:
    """Forward and backward over the context's tokens; every block is visited on the way back."""
    assert context.tokens is not None
    passes = GradientPasses(
        context.source,
        context.tokens,
        device=context.device,
        dtype=context.dtype,
        new_store=context.new_store,
        on_block=context.steps,
    )
    try:
        context.steps.begin("blocks: forward pass", len(passes.block_names))
        passes.forward()
        context.steps.begin("blocks: backward pass, rounding to every candidate", len(passes.block_names))
        if sampled:
            passes.sample_labels(torch.Generator().manual_seed(context.seed))
        else:
            passes.text_labels()
        for block in passes.backward():
            visit(block)
    finally:
        passes.close()
    return passes


def _from_squares(context: Context, value: Callable[[Tensor, Tensor], Tensor]) -> ScoreValues:
    """A score that is a function of a weight's summed squared gradients and a format's error."""
    assert context.tokens is not None
    table: dict[str, list[float]] = {}
    details: dict[str, dict[str, float]] = {}
    notes: dict[str, None] = {}
    per_token = 0.5 / context.tokens.numel()

    def visit(block: BlockGradients) -> None:
        linears = {n: m for n, m in block.linears.items() if f"{block.name}.{n}" in wanted}
        sums: dict[str, Tensor] = {}
        for calls in block.batches():
            for name in linears.keys() & calls.keys():
                squares = squared_gradient(calls[name])
                sums[name] = squares if name not in sums else sums[name].add_(squares)
                if calls[name][0][0].ndim != 3:
                    notes[_BY_TOKEN] = None
        for name, module in linears.items():
            full = f"{block.name}.{name}"
            if name not in sums:
                table[full] = [0.0] * len(context.candidates)
                notes[f"{full}: no token reached it, so no format costs anything there"] = None
                continue
            weight = linear_weight(module).detach().float()
            table[full] = [per_token * float(value(sums[name], error)) for error in context.errors(weight)]
            details[full] = {"trace": float(sums[name].sum()) / context.tokens.numel()}  # type: ignore[union-attr]

    wanted = frozenset(context.linears)
    _gradients(context, visit)
    return ScoreValues(table, notes=tuple(notes), details=details)


def _fisher(context: Context) -> ScoreValues:
    return _from_squares(context, lambda squares, error: (squares * error).mul_(error).sum())


def _hawq(context: Context) -> ScoreValues:
    return _from_squares(context, lambda squares, error: squares.mean() * error.square().sum())


def _from_outputs(context: Context, value: Callable[[Tensor, Tensor], Tensor], *, sampled: bool = True) -> ScoreValues:
    """A score that is a function of what a format moves an output by, and of the gradient by that output."""
    assert context.tokens is not None
    per_token = 0.5 / context.tokens.numel()
    wanted = frozenset(context.linears)
    table: dict[str, list[float]] = {}

    def visit(block: BlockGradients) -> None:
        errors: dict[str, list[Tensor]] = {}
        for name, module in block.linears.items():
            if f"{block.name}.{name}" in wanted:
                weight = linear_weight(module).detach().float()
                errors[name] = [error.to(context.dtype) for error in context.errors(weight)]
                table[f"{block.name}.{name}"] = [0.0] * len(context.candidates)
        for calls in block.batches():
            for name in errors.keys() & calls.keys():
                row = table[f"{block.name}.{name}"]
                for inputs, gradients in calls[name]:
                    for column, error in enumerate(errors[name]):
                        moved = (inputs @ error.T).float()
                        row[column] += per_token * float(value(moved, gradients.float()))

    _gradients(context, visit, sampled=sampled)
    return ScoreValues(table)


def _out_fisher(context: Context) -> ScoreValues:
    return _from_outputs(context, lambda moved, gradients: (moved * gradients).sum(-1).square().sum())


def _modelopt(context: Context) -> ScoreValues:
    return _from_outputs(context, lambda moved, gradients: (moved * gradients).square().sum(), sampled=False)


_COST = "one forward pass and one backward pass with recomputation over the tokens, and one rounding per candidate"
FISHER = Score(
    "fisher", "diagonal of the weights' Fisher matrix, labels drawn from the model", _COST, "nats", True, _fisher
)
OUT_FISHER = Score(
    "out-fisher",
    "Fisher matrix of the outputs, token by token, labels drawn from the model",
    f"{_COST}; also a forward pass of the linears per candidate",
    "nats",
    True,
    _out_fisher,
)
HAWQ = Score(
    "hawq", "HAWQ-V2: mean trace of the Hessian (sampled gradients) x squared error", _COST, "nats", True, _hawq
)
MODELOPT = Score(
    "modelopt",
    "squared products of outputs' gradients and errors (AutoQuantize of Model Optimizer), labels of the text",
    f"{_COST}; also a forward pass of the linears per candidate",
    "nats",
    True,
    _modelopt,
)
