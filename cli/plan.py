"""``ptq plan``: flags to a `ptq.allocation.Planner`, a file, a summary, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.errors import UsageError

if TYPE_CHECKING:
    from ptq.allocation import Plan, Planner, PlanOptions
    from ptq.allocation.problem.budget import Budget

__all__ = ["command"]


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="The plan; with --pareto alone the curve, .html or .json.  [default: plan.yaml]",
)
@click.option(
    "--target-bpw",
    type=float,
    metavar="X",
    help="Average bits per weight of the linears, scales and zero points included.",
)
@click.option("--target-size", metavar="SIZE", help="Size of the whole checkpoint (all weight files), e.g. 90MB.")
@click.option(
    "--max-kl", type=float, metavar="X", help="The smallest plan whose predicted KL is at most X nats per token."
)
@click.option(
    "--fraction",
    type=float,
    metavar="F",
    help="With --score lim, zd, random: the part of the blocks that gets the higher of two candidates.",
)
@click.option(
    "--bitops",
    type=float,
    metavar="F",
    help="Also limit bit operations (weight bits x input bits), from 0, the fewest possible, to 1, the most.",
)
@click.option(
    "--candidates",
    metavar="NAMES",
    help="Formats to choose from: 3 (bits), 3g32 (groups of 32), 4asym, nvfp4, bf16 ...  [default: 2,3,4,5,6,8]",
)
@click.option("--score", default="fisher", metavar="NAME", help="How sensitivity is measured: see the list above.")
@click.option("--solver", default="milp", metavar="NAME", help="milp (exact), lagrangian or greedy.")
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="PATTERN>=BITS",
    help="Bits that linears may have, e.g. '*.down_proj>=4'; also <= and =. Repeat for more.",
)
@click.option(
    "--include", metavar="embedding,lm_head", help="Also choose a format for these; a tied head is the embedding."
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="PATTERN",
    help="Linears to leave in full precision and out of the budget. Repeat for more.",
)
@click.option("--fused/--free", default=False, help="q, k and v (gate and up) share a format, as vLLM needs it.")
@click.option(
    "--group-size", type=int, metavar="N", help="Input channels that share a scale; 0 is per channel.  [default: 64]"
)
@click.option("--sym/--asym", "symmetric", default=None, help="Grid around zero, or a zero point.  [default: sym]")
@click.option("--calib", default="c4", metavar="SOURCE", help="Calibration text that scores read, as in ptq quantize.")
@click.option(
    "--calib-samples",
    default=32,
    type=int,
    metavar="N",
    help="Sequences; a quarter more is drawn and held out to measure KL.",
)
@click.option(
    "--calib-seqlen", type=int, metavar="T", help="Tokens in each sequence.  [default: 512, or the model's context]"
)
@click.option("--seed", default=0, type=int, help="Seed for drawing sequences and labels.")
@click.option(
    "--probes",
    default=16,
    type=click.IntRange(min=1),
    metavar="N",
    help="With hawq-hvp: random vectors per sequence; with hawq-eig: most iterations per linear.",
)
@click.option("--check/--no-check", default=True, help="Measure the plan's KL on held-out tokens, rounded to nearest.")
@click.option(
    "--refine",
    default=0,
    type=click.IntRange(min=0),
    metavar="N",
    help="Rounds of measuring every linear again in the mixed model; kept if held-out KL falls.",
)
@click.option("--pareto", is_flag=True, help="The whole curve: predicted KL against real bits; needs no target.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Also write a page with pictures: bits by layer, predicted and measured KL, the curve.",
)
@click.option(
    "--dtype", default="auto", metavar="DTYPE", help="Precision of passes through the model: auto, float32 or bfloat16."
)
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where to work.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Where scores are kept. [default: $PTQ_CACHE or ~/.cache/ptq]",
)
@click.option("--trust-remote-code", is_flag=True, help="Allow model code that comes with a hub model.")
@click.option("--json", "as_json", is_flag=True, help="The plan on stdout as JSON and nothing else there.")
def command(model: str, **flags: Any) -> None:
    """Choose a format for every linear of MODEL within a budget, and write the choice as a YAML file.

    \b
    Examples:
      ptq plan MODEL --target-bpw 3.5
      ptq plan MODEL --target-size 90MB --candidates 3,4,6 --limit '*.down_proj>=4' -o plan.yaml
      ptq plan MODEL --pareto --html plan.html
      ptq plan MODEL --score lim --candidates 3,4 --fraction 0.5
      ptq quantize --method coreq --plan plan.yaml MODEL

    \b
    Scores (--score), what a format costs a linear:
      fisher      squared error weighted by the Fisher diagonal (squared gradients, labels drawn from the model)
      out-fisher  squared error of the output along its gradient, token by token
      modelopt    as AutoQuantize in NVIDIA Model Optimizer: output error x gradient, labels of the text
      hawq        HAWQ-V2: mean trace of the Hessian x squared error, trace from sampled gradients
      hawq-hvp    the same, trace by Hutchinson's method with Hessian-vector products (--probes)
      hawq-eig    HAWQ-V1: top eigenvalue of the Hessian x squared error
      kl          KL measured with that linear alone rounded
      lim         ranks blocks by how far each turns the hidden state (layer input modification)
      zd          ranks blocks by their share of weights above one standard deviation (z-score distribution)
      random      ranks blocks in random order; uniform gives all linears one format

    Scores are kept: another budget, solver or limit takes seconds.
    """
    from cli.shared.plan_curve import show_curve
    from cli.shared.terminal.progress import ProgressListener
    from cli.shared.terminal.screen import console, echo
    from ptq.allocation import make_planner

    budget = _budget(flags)
    target = None if budget is None and flags["out"] is None else Path(flags["out"] or "plan.yaml")
    _check_targets(target, flags, only_curve=budget is None)
    with ProgressListener(console(stderr=True)) as listener:
        planner = make_planner(
            model,
            _options(flags),
            device=flags["device"],
            trust_remote_code=flags["trust_remote_code"],
            on_event=listener,
            cache=flags["cache"] or "",
        )
        plan, layers = None, []
        if budget is not None and target is not None:
            plan, allocation = planner.planned(budget, flags["solver"], check=flags["check"], rounds=flags["refine"])
            plan.save(target)
            layers = planner.layers(allocation)
        curve = (
            planner.curve(solver=flags["solver"]) if flags["pareto"] or (flags["html"] and _predicts(planner)) else []
        )
        uniform = planner.uniform() if curve else []
    if flags["html"] or (plan is None and target is not None):
        _write_pages(model, flags["html"], target if plan is None else None, plan, layers, curve, uniform)
    if flags["as_json"]:
        shown = ({} if plan is None else plan.to_dict()) | (
            {"curve": curve, "uniform": uniform} if flags["pareto"] else {}
        )
        echo(json.dumps(shown, allow_nan=False))
        return
    if plan is not None and target is not None:
        _show_plan(plan, target)
    if flags["pareto"]:
        show_curve(console(), curve, uniform)
    for file in (flags["html"], target if plan is None else None):
        if file is not None:
            console().print(f"written to {file}", soft_wrap=True)


def _check_targets(target: Path | None, flags: dict[str, Any], *, only_curve: bool) -> None:
    """Before minutes of scoring: files can be written where they are asked for."""
    from cli.shared.plan_curve import check_curve_file

    if only_curve and target is not None:
        check_curve_file(target)
    for path in (target, flags["html"]):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {Path(path).absolute().parent}; make it first.")


def _budget(flags: dict[str, Any]) -> Budget | None:
    """The target; ``None`` where only the curve is asked for."""
    from ptq.allocation.problem.budget import Budget, parse_size

    size = None if flags["target_size"] is None else parse_size(flags["target_size"])
    values = (flags["target_bpw"], size, flags["max_kl"], flags["fraction"])
    if flags["pareto"] and all(value is None for value in values):
        return None
    return Budget(*values, bitops=flags["bitops"])


def _predicts(planner: Planner) -> bool:
    return planner.setting.score.unit != "order"


def _write_pages(
    model: str, html: str | None, data: Path | None, plan: Plan | None, layers: Any, curve: Any, uniform: Any
) -> None:
    from cli.shared.plan_curve import write_curve
    from evals.report.plan_page import plan_page

    about = {"model": model} if plan is None else plan.about
    page = plan_page(title=f"Plan: {Path(model).name}", layers=layers, about=about, curve=curve, uniform=uniform)
    for path in (html, data):
        if path is not None:
            write_curve(Path(path), page, curve, uniform)


def _show_plan(plan: Plan, target: Path) -> None:
    from cli.shared.tables import size
    from cli.shared.terminal.screen import console

    screen = console()
    screen.print(f"{target}: {plan.describe()}", soft_wrap=True)
    about = plan.about
    for key, origin in (("predicted_kl", f"errors {about['errors']}"), ("measured_kl", _held_out(about))):
        if key in about:
            screen.print(f"  {key.replace('_kl', ' KL')}: {about[key]:.4g} nats per token, {origin}", soft_wrap=True)
    screen.print(f"  weight files: {size(about['file_bytes'])} ({about['file_bytes']:,} bytes)", soft_wrap=True)
    for note in plan.about.get("notes", ()):
        screen.print(f"note: {note}", style="yellow", soft_wrap=True)


def _held_out(about: Mapping[str, Any]) -> str:
    error = f" +- {about['measured_kl_se']:.2g}" if "measured_kl_se" in about else ""
    return f"on {about.get('held_out_tokens', 0):,} held-out tokens{error}, weights rounded to nearest"


def _options(flags: dict[str, Any]) -> PlanOptions:
    from ptq.allocation import PlanOptions
    from ptq.allocation.problem.candidates import DEFAULT_CANDIDATES
    from ptq.recipe import CalibrationSpec
    from ptq.scheme import Scheme

    fields: dict[str, Any] = {}
    if flags["group_size"] is not None:
        fields["group_size"] = flags["group_size"] or None
    if flags["symmetric"] is not None:
        fields["symmetric"] = flags["symmetric"]
    return PlanOptions(
        candidates=flags["candidates"] or DEFAULT_CANDIDATES,
        base=Scheme(**fields),
        score=flags["score"],
        limits=flags["limits"],
        include=tuple(name.strip() for name in (flags["include"] or "").split(",") if name.strip()),
        ignore=flags["ignore"],
        fused=flags["fused"],
        calibration=CalibrationSpec(flags["calib"], flags["calib_samples"], flags["calib_seqlen"], flags["seed"]),
        compute_dtype=flags["dtype"],
        probes=flags["probes"],
    )
