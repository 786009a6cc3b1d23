"""How long a run takes on a CPU, from a count of operations: enough to tell minutes from hours before it starts.

No block is run for it (that is what `ptq.forecast` does). Counted are the products of the passes, of the statistics, of
the solves and of learning; the machine's speed is that of one small product.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from ptq.pipeline.preparation.method_setup import MethodSetup
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan

__all__ = ["LONG_SECONDS", "long_run_notices", "rough_operations"]

LONG_SECONDS = 3600.0
_CHEAP_SAMPLES, _CHEAP_SEQLEN = 16, 512
_SIZE, _REPEATS = 512, 3  # of the product that is timed
_EFFICIENCY = 0.5  # of a whole run, against that product
_SHARED = 4 / 7  # input groups per linear in a block of the Llama kind
_TRAINING = 3  # forward, and backward to inputs and weights


def long_run_notices(model: nn.Module, plan: Plan, method: MethodSetup, samples: int, seqlen: int) -> list[str]:
    """A sentence for a run without a GPU that takes longer than `LONG_SECONDS`, with cheaper settings; else none.

    Args:
        model: the skeleton.
        plan: what to do to its linears.
        method: the method with its options.
        samples: calibration sequences.
        seqlen: tokens in each.
    """
    rate = _EFFICIENCY * _operations_per_second()
    seconds = rough_operations(model, plan, method, samples, seqlen) / rate
    if seconds <= LONG_SECONDS:
        return []
    cheap = (min(samples, _CHEAP_SAMPLES), min(seqlen, _CHEAP_SEQLEN))
    cheaper = rough_operations(model, plan, method, *cheap) / rate
    ways = []
    if cheaper < seconds / 2:
        ways.append(f"--calib-samples {cheap[0]} --calib-seqlen {cheap[1]} takes about {_words(cheaper)}")
    if method.learned is not None:
        ways.append("--method coreq learns nothing and takes a small part of it")
    ways.append("--method rtn needs no calibration and takes minutes")
    return [
        f"without a GPU this takes about {_words(seconds)} ({samples} x {seqlen} calibration tokens, by a rough count; "
        f"--dry-run measures). Cheaper: {'; '.join(ways)}"
    ]


def rough_operations(model: nn.Module, plan: Plan, method: MethodSetup, samples: int, seqlen: int) -> float:
    """Floating-point operations of a run, within a factor of about two."""
    tokens, shapes = samples * seqlen, [_shape(model, name) for name, scheme in plan.schemes.items() if scheme]
    weights = sum(out * width for out, width in shapes) * _active(model)
    config = method.learned
    if config is not None:
        blocks = len(plan.blocks)
        visits = sum(len(window) for window in config.windows(blocks)) / blocks
        bits = [scheme.bits for scheme in plan.schemes.values() if scheme is not None]
        batches = max(1, samples // config.batch)
        steps = config.steps(batches, bits) * sum(len(sweep) for sweep in config.sweeps)
        seen = steps * config.batch * config.grad_accum * seqlen
        return 2.0 * weights * (_TRAINING * visits * seen + 3 * tokens)
    needs = 0 if method.solver is None else len(method.solver.needs)
    if not needs:
        return 0.0
    statistics = sum(_SHARED * 2.0 * tokens * width**2 for _, width in shapes) * needs * _active(model)
    solves = sum(2.0 * out * width**2 + width**3 for out, width in shapes)
    return 2 * 2.0 * weights * tokens + statistics + solves


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    weight: Any = model.get_submodule(name).weight
    out, width = weight.shape
    return int(out), int(width)


def _active(model: nn.Module) -> float:
    """The share of the experts that a token goes through; 1 for a model without experts."""
    config: Any = model.config
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((count for name in names if (count := getattr(text, name, None))), None)
    return min(1.0, chosen / total) if chosen and total else 1.0


def _operations_per_second() -> float:
    """Of one small float32 product on the CPU, the best of a few."""
    a = torch.ones(_SIZE, _SIZE)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2.0 * _SIZE**3 / max(best, 1e-9)


def _words(seconds: float) -> str:
    if seconds < 90 * 60:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
