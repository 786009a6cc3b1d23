"""``ptq plan``: flags to a call of `ptq.plan`, a file, and a summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ptq.allocation import PlanOptions

__all__ = ["command"]


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option("-o", "--out", type=click.Path(dir_okay=False), metavar="FILE", help="The plan.  [default: plan.yaml]")
@click.option("--target-bpw", type=float, metavar="X", help="Real bits per weight of the linears, scales included.")
@click.option("--target-size", metavar="SIZE", help="Bytes of all weight files, e.g. 90MB.")
@click.option(
    "--max-kl", type=float, metavar="X", help="The smallest plan of at most this predicted KL (nats per token)."
)
@click.option(
    "--fraction", type=float, metavar="F", help="With lim, zd, random: blocks at the higher of two candidates."
)
@click.option("--bitops", type=float, metavar="F", help="Besides: bit operations, from 0 (the fewest) to 1 (the most).")
@click.option("--candidates", metavar="NAMES", help="Formats: 2,3,4 or 3g32,4asym or bf16.  [default: 2,3,4,5,6,8]")
@click.option("--score", default="fisher", metavar="NAME", help="How sensitivity is measured; see docs/allocation.md.")
@click.option("--solver", default="milp", metavar="NAME", help="milp, lagrangian or greedy.")
@click.option("--limit", "limits", multiple=True, metavar="PATTERN>=BITS", help="Also <= and =; repeat.")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Linears that stay as they are; repeat.")
@click.option("--fused/--free", default=False, help="q, k and v (gate and up) share a format, as vLLM needs it.")
@click.option(
    "--group-size", type=int, metavar="N", help="Input channels that share a scale; 0 is per channel.  [default: 64]"
)
@click.option("--sym/--asym", "symmetric", default=None, help="Grid around zero, or a zero point.  [default: sym]")
@click.option("--calib", default="c4", metavar="SOURCE", help="Text for scores, as in ptq quantize.")
@click.option("--calib-samples", default=32, type=int, metavar="N", help="Sequences; some more are held out.")
@click.option("--calib-seqlen", default=512, type=int, metavar="T", help="Tokens in each sequence.")
@click.option("--seed", default=0, type=int, help="Seed of the draw of sequences and labels.")
@click.option(
    "--probes", default=16, type=click.IntRange(min=1), metavar="N", help="Of Hutchinson and power iteration."
)
@click.option("--check/--no-check", default=True, help="Measure the plan's KL on held-out tokens.")
@click.option("--dtype", default="auto", metavar="DTYPE", help="Passes through the model: auto, float32 or bfloat16.")
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
      ptq plan MODEL --score lim --candidates 3,4 --fraction 0.5
      ptq quantize --method coreq --plan plan.yaml MODEL

    Scores are kept: another budget, solver or limit takes seconds.
    """
    import ptq
    from cli.shared.terminal.progress import ProgressListener
    from cli.shared.terminal.screen import console, echo
    from ptq.allocation.budget import parse_size

    target = Path(flags["out"] or "plan.yaml")
    with ProgressListener(console(stderr=True)) as listener:
        plan = ptq.plan(
            model,
            target_bpw=flags["target_bpw"],
            target_size=None if flags["target_size"] is None else parse_size(flags["target_size"]),
            max_kl=flags["max_kl"],
            fraction=flags["fraction"],
            bitops=flags["bitops"],
            solver=flags["solver"],
            check=flags["check"],
            options=_options(flags),
            device=flags["device"],
            trust_remote_code=flags["trust_remote_code"],
            on_event=listener,
            cache=flags["cache"] or "",
        )
    plan.save(target)
    if flags["as_json"]:
        echo(json.dumps(plan.to_dict(), allow_nan=False))
        return
    screen = console()
    screen.print(f"{target}: {plan.describe()}", soft_wrap=True)
    for key in ("predicted_kl", "measured_kl", "file_bytes"):
        if key in plan.about:
            screen.print(f"  {key.replace('_', ' ')}: {plan.about[key]:,}", soft_wrap=True)
    for note in plan.about.get("notes", ()):
        screen.print(f"note: {note}", style="yellow", soft_wrap=True)


def _options(flags: dict[str, Any]) -> PlanOptions:
    from ptq.allocation import PlanOptions
    from ptq.allocation.candidates import DEFAULT_CANDIDATES
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
        ignore=flags["ignore"],
        fused=flags["fused"],
        calibration=CalibrationSpec(flags["calib"], flags["calib_samples"], flags["calib_seqlen"], flags["seed"]),
        compute_dtype=flags["dtype"],
        probes=flags["probes"],
    )
