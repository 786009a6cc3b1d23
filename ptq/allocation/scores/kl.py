"""Direct KL: every linear alone is rounded in one format, and the KL divergence of the model that results is measured.

Only what comes after the linear is run again: what enters every block of the full model is kept, and the pass begins at
the linear's block. One format is measured, the second smallest; the others follow from the squared error, to which the
KL is proportional as long as errors are small (the linearity of HIGGS, arXiv 2411.17525).

The whole model is in memory.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from calib.checkpoint.reader import ModelSource
from calib.checkpoint.resident import ResidentSource
from calib.gradients import GradientPasses
from calib.model.structure import find_linears, linear_weight, set_linear_weight
from ptq.allocation.measure import token_kl
from ptq.allocation.problem.candidates import Candidate
from ptq.allocation.scores.base import Context, Score, ScoreValues

__all__ = ["KL", "probe_column"]


def probe_column(candidates: tuple[Candidate, ...]) -> int:
    """The format that is measured: the second smallest by bits, the only one if there is one."""
    order = np.argsort([candidate.bits for candidate in candidates], kind="stable")
    quantized = [int(column) for column in order if candidates[int(column)].scheme is not None]
    return quantized[min(1, len(quantized) - 1)] if quantized else 0


def _compute(context: Context) -> ScoreValues:
    assert context.tokens is not None
    resident = ResidentSource(context.source)
    passes = GradientPasses(
        cast(ModelSource, resident),
        context.tokens,
        device=context.device,
        dtype=context.dtype,
        new_store=context.new_store,
    )
    probe = probe_column(context.candidates)
    try:
        passes.forward()
        context.steps.begin("blocks: KL with each linear rounded alone", len(passes.block_names))
        with passes.head():
            table: dict[str, list[float]] = {}
            for index, name in enumerate(passes.block_names):
                table |= _block(context, passes, index, name, probe)
                context.steps(name)
    finally:
        passes.close()
        resident.close()
    label = context.candidates[probe].label
    return ScoreValues(table, notes=(f"KL was measured at {label} and scaled to other formats by the squared error",))


def _block(context: Context, passes: GradientPasses, index: int, name: str, probe: int) -> dict[str, list[float]]:
    """The rows of one block's linears."""
    rows = {}
    wanted = frozenset(context.linears)
    for linear, module in find_linears(passes.source.skeleton.get_submodule(name)).items():
        full = f"{name}.{linear}"
        if full not in wanted:
            continue
        kept = linear_weight(module).detach()
        energies, rounded = [], kept
        for column, error in enumerate(context.errors(kept.float())):
            energies.append(float(error.square().sum()))
            if column == probe:
                rounded = (kept.float() + error).to(kept.dtype)
        set_linear_weight(module, rounded)
        kl = _measured(passes, index)
        set_linear_weight(module, kept)
        rows[full] = [kl * energy / energies[probe] if energies[probe] else 0.0 for energy in energies]
    return rows


def _measured(passes: GradientPasses, index: int) -> float:
    """KL per token of the model with the weights that it has now, which differ in one block."""
    total, count = 0.0, 0
    for number in range(len(passes.tokens)):
        for sequence, one in enumerate(passes.logits_from(index, number)):
            total += float(token_kl(passes.logits(number, sequence), one).double().sum())
            count += one.shape[0]
    return total / count


KL = Score(
    "kl",
    "KL divergence of the model with one linear rounded, measured",
    "half a forward pass per linear, forward only; the whole model in memory",
    "nats",
    True,
    torch.no_grad()(_compute),
)
