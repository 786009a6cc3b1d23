"""`plan`: from a model and a budget to a `Plan`, the call behind ``ptq plan``."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from calib.checkpoint.reader import ModelSource, open_model
from calib.data.tokens import Calibration
from calib.model.structure import end_modules, tied_head
from calib.runner.forward import pass_dtype
from ptq.allocation.plan import Plan
from ptq.allocation.planner import Planner
from ptq.allocation.problem.budget import Budget, parse_size
from ptq.allocation.problem.candidates import DEFAULT_CANDIDATES, Candidate, parse_candidates
from ptq.allocation.problem.groups import parse_limit
from ptq.allocation.problem.items import linears_of
from ptq.allocation.progress import Steps
from ptq.allocation.scores import Score, find_score
from ptq.allocation.scores.cache import default_cache
from ptq.allocation.setting import Setting
from ptq.api import resolve_device
from ptq.errors import UsageError, unknown_name
from ptq.pipeline.events import Event, Listener, ignore_events
from ptq.pipeline.preparation.calibration import draw_calibration, load_tokenizer, longest_context
from ptq.pipeline.preparation.preflight import check_vocabulary
from ptq.pipeline.preparation.schemes.outside import outside_modules
from ptq.pipeline.preparation.schemes.scheme_assignment import make_plan
from ptq.pipeline.preparation.sizes import plan_sizes
from ptq.recipe import CalibrationSpec, Recipe
from ptq.scheme import Scheme

__all__ = ["INCLUDES", "PlanOptions", "make_planner", "plan"]

INCLUDES = ("embedding", "lm_head")
"""What ``--include`` takes."""
_USUAL_SEQLEN = 512  # where nothing is said and the model takes so many
_HELD_OUT = 4  # one sequence in so many, at least 2, is drawn besides for measuring


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What decides a plan, besides model and budget.

    Args:
        candidates: names of formats (`ptq.allocation.problem.candidates.parse_candidates`).
        base: what a candidate's name does not say: groups, sign, dtype of the scales.
        score: a name of `ptq.allocation.scores.SCORES`.
        limits: conditions such as ``*.down_proj>=4``.
        include: ``embedding`` and ``lm_head``, which are no candidates otherwise. A tied head is the embedding.
        ignore: patterns of linears that stay in full precision and out of the budget.
        fused: linears that runtimes such as vLLM compute in one kernel share a format.
        calibration: the text that scores read.
        compute_dtype: of passes, as in a recipe.
        probes: Hutchinson probes and power iterations.
    """

    candidates: str = DEFAULT_CANDIDATES
    base: Scheme = dataclasses.field(default_factory=Scheme)
    score: str = "fisher"
    limits: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    fused: bool = False
    calibration: CalibrationSpec = dataclasses.field(default_factory=lambda: CalibrationSpec(samples=32))
    compute_dtype: str = "auto"
    probes: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.candidates, str):
            raise UsageError(f"candidates are one text with commas, e.g. '3,4,6'; got {self.candidates!r}.")
        for name in ("limits", "include", "ignore"):
            if isinstance(getattr(self, name), str):
                raise UsageError(f"{name} is a tuple of texts; write ({getattr(self, name)!r},).")
        if self.probes < 1:
            raise UsageError(f"probes must be at least 1, got {self.probes!r}.")


def plan(
    model: str | os.PathLike[str] | nn.Module,
    *,
    target_bpw: float | None = None,
    target_size: int | str | None = None,
    max_kl: float | None = None,
    fraction: float | None = None,
    bitops: float | None = None,
    solver: str = "milp",
    check: bool = True,
    refine: int = 0,
    options: PlanOptions | None = None,
    **planner: Any,
) -> Plan:
    """Choose a format for every linear.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, or a transformers model in memory.
        target_bpw: real bits per weight of the linears, scales and zero points included.
        target_size: bytes of all weight files, instead; or with a unit, ``"90MB"``.
        max_kl: predicted KL divergence in nats per token that the smallest plan may cost, instead.
        fraction: of the blocks at the higher of two candidates, instead (scores that rank blocks).
        bitops: also limit bit operations to this fraction of the way from the fewest to the most.
        solver: ``milp``, ``lagrangian`` or ``greedy``.
        check: measure the plan's KL on held-out tokens and write it into the plan.
        refine: rounds of measuring again around the chosen plan (`ptq.allocation.refine`); each is kept only if the KL
            on held-out tokens falls significantly. The whole model is in memory.
        options: everything else.
        planner: further arguments of `make_planner`: ``tokenizer``, ``calibration``, ``device``, ``on_event``,
            ``trust_remote_code``, ``cache``.

    Raises:
        PtqError: see `ptq.errors`.
    """
    size = parse_size(target_size) if isinstance(target_size, str) else target_size
    budget = Budget(target_bpw, size, max_kl, fraction, bitops)
    made = make_planner(model, options, **planner)
    return made.planned(budget, solver, check=check, rounds=refine)[0]


def make_planner(
    model: str | os.PathLike[str] | nn.Module,
    options: PlanOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | None = None,
    device: str = "auto",
    on_event: Listener | None = None,
    trust_remote_code: bool = False,
    cache: str | os.PathLike[str] | None = "",
) -> Planner:
    """A `Planner` for a model, from which plans for several budgets can be made.

    Args:
        model: as in `plan`.
        options: what decides the plan.
        tokenizer: needed with a model in memory, unless ``calibration`` is given.
        calibration: tokens to use instead of the options' text; the last of them are held out for measuring.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:i``.
        on_event: called with sentences for the log and after every step of what is being done.
        trust_remote_code: run modelling code that ships with the model.
        cache: folder for scores; empty is ``$PTQ_CACHE`` or the user's cache folder, ``None`` keeps none.
    """
    options, listener = options or PlanOptions(), on_event or ignore_events
    score, limits = find_score(options.score), tuple(parse_limit(text) for text in options.limits)
    candidates = parse_candidates(options.candidates, options.base)
    where = resolve_device(device)
    source = open_model(
        model if isinstance(model, nn.Module) else os.fspath(model), trust_remote_code=trust_remote_code
    )
    candidates = tuple(
        Candidate(c.label, None if c.scheme is None else c.scheme.resolved(source.dtype)) for c in candidates
    )
    assigned = make_plan(source.skeleton, Recipe(ignore=options.ignore), source.dtype)
    names = tuple(name for name, scheme in assigned.schemes.items() if scheme is not None)
    outside = _included(source.skeleton, options.include, score)
    assigned = dataclasses.replace(
        assigned, outside=dict.fromkeys(outside, Scheme.of("int", bits=8).resolved(source.dtype))
    )
    kept = plan_sizes(source, assigned, lambda name, _: (name, "")).kept_bytes
    tokens, held_out = _tokens(source, options, score.reads_tokens, tokenizer, calibration, listener, trust_remote_code)
    setting = Setting(
        source,
        linears_of(source.skeleton, (*names, *outside)),
        candidates,
        kept,
        score,
        tokens,
        held_out,
        where,
        _dtype(options.compute_dtype, source.dtype, where),
        options.calibration.seed,
        options.probes,
        outside,
    )
    return Planner(
        setting,
        limits=limits,
        fused=options.fused,
        cache=default_cache() if cache == "" else None if cache is None else Path(cache),
        say=lambda text: listener(Event("message", text)),
        steps=Steps(listener),
    )


def _included(model: nn.Module, include: tuple[str, ...], score: Score) -> tuple[str, ...]:
    """Full names of the embedding and the head, where they are asked for."""
    if not include:
        return ()
    if score.unit != "nats":
        raise UsageError(
            f"--include measures KL for the embedding and the head, which the score {score.name!r} is no sum with: "
            f"take fisher, out-fisher, hawq or kl."
        )
    modules, (embedding, head) = outside_modules(model), end_modules(model)
    found: dict[str, None] = {}
    for name in include:
        if name not in INCLUDES:
            raise unknown_name("part for --include", name, INCLUDES)
        wanted = head if name == "lm_head" and tied_head(model) is None else embedding
        found |= {full: None for full, module in modules.items() if module is wanted}
    if not found:
        raise UsageError(f"--include {','.join(include)}: {type(model).__name__} has no such module.")
    return tuple(found)


def _dtype(asked: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """As for the passes of a quantization; never float16, in which small gradients vanish."""
    found = pass_dtype(asked, stored, device)
    if found != torch.float16:
        return found
    if asked == "float16":
        raise UsageError("gradients vanish in float16: take --dtype bfloat16 or float32.")
    return pass_dtype("auto", torch.bfloat16, device)


def _tokens(
    source: ModelSource,
    options: PlanOptions,
    reads: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration | None,
    listener: Listener,
    trust_remote_code: bool,
) -> tuple[Calibration | None, torch.Tensor | None]:
    """The tokens of scores and those that are held out, which are drawn together and do not overlap."""
    spec = options.calibration
    if calibration is None:
        if not reads:
            return None, None
        more = max(2, spec.samples // _HELD_OUT)
        tokenizer = tokenizer or load_tokenizer(source, trust_remote_code, required=True)
        drawn = dataclasses.replace(spec, samples=spec.samples + more).fitted(
            longest_context(source.skeleton), _USUAL_SEQLEN
        )
        calibration = draw_calibration(source, drawn, tokenizer, listener, trust_remote_code)
    else:
        more = max(1, len(calibration.tokens) // (_HELD_OUT + 1))
    if len(calibration.tokens) <= more:
        raise UsageError("a plan needs at least two sequences: one for scores, one held out.")
    check_vocabulary(source.skeleton, calibration.tokens)
    scored, held_out = calibration.tokens[:-more], calibration.tokens[-more:]
    return (dataclasses.replace(calibration, tokens=scored) if reads else None), held_out
