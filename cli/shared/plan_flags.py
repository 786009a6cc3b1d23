"""``ptq quantize --plan FILE`` and ``--target-bpw X``: the formats of linears from a plan, read or made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from calib.errors import UsageError

if TYPE_CHECKING:
    from ptq.pipeline.events import Listener
    from ptq.recipe import Recipe

__all__ = ["plan_flags", "planned_formats", "planned_output", "planned_recipe"]

F = TypeVar("F", bound=Callable[..., Any])


def plan_flags(command: F) -> F:
    """A decorator: the flags of plans."""
    for option in (
        click.option(
            "--score", metavar="NAME", help="With --target-bpw: how sensitivity is measured.  [default: fisher]"
        ),
        click.option("--candidates", metavar="NAMES", help="With --target-bpw: the formats.  [default: 2,3,4,5,6,8]"),
        click.option("--target-bpw", type=float, metavar="X", help="Plan first: ptq plan, then this with its plan."),
        click.option(
            "--plan",
            "plan_file",
            multiple=True,
            callback=_one_plan,
            metavar="FILE.yaml",
            help="The format of every linear, from ptq plan.",
        ),
    ):
        command = option(command)
    return command


def _one_plan(context: click.Context, option: click.Parameter, files: tuple[str, ...]) -> str | None:
    if len(files) > 1:
        raise UsageError(f"--plan is given {len(files)} times ({', '.join(files)}): give one plan.")
    return files[0] if files else None


def planned_formats(flags: Mapping[str, Any]) -> str | None:
    """What decides the formats of linears where a plan does, in words; ``None`` where none does."""
    if flags["plan_file"] is not None:
        return f"formats of {flags['plan_file']}"
    if flags["target_bpw"] is not None:
        return f"a plan of {flags['target_bpw']:g} bits per weight"
    return None


def planned_output(model: str, recipe: Recipe, flags: Mapping[str, Any]) -> Path | None:
    """The folder's name where nothing is said and a plan decides; ``None`` where none does."""
    stem = Path(model).resolve().name.removesuffix(".gguf")
    if flags["plan_file"] is not None:
        return Path(f"{stem}-{recipe.method}-{Path(flags['plan_file']).stem}")
    if flags["target_bpw"] is not None:
        return Path(f"{stem}-{recipe.method}-{flags['target_bpw']:g}bpw")
    return None


def planned_recipe(
    model: str, recipe: Recipe, flags: Mapping[str, Any], listener: Listener, *, device: str, trust_remote_code: bool
) -> Recipe:
    """The recipe with the formats of a plan, if one is named or asked for.

    Raises:
        UsageError: both are, options of planning without a target, or the plan does not fit.
    """
    file, target = flags["plan_file"], flags["target_bpw"]
    if file is not None and target is not None:
        raise UsageError("--plan names a plan and --target-bpw makes one: give one of them.")
    for name in ("candidates", "score"):
        if flags[name] is not None and target is None:
            raise UsageError(f"--{name} belongs to --target-bpw, which makes a plan; ptq plan takes it as well.")
    if file is None and target is None:
        return recipe
    import ptq
    from ptq.allocation import PlanOptions, read_plan, recipe_from_plan
    from ptq.pipeline.events import Event

    def say(text: str) -> None:
        listener(Event("message", text))

    if file is not None:
        plan = read_plan(Path(file))
    else:
        asked = {name: flags[name] for name in ("candidates", "score") if flags[name] is not None}
        calibration = dataclasses.replace(PlanOptions().calibration, **_text(recipe))
        options = PlanOptions(base=recipe.scheme, ignore=recipe.ignore, calibration=calibration, **asked)
        plan = ptq.plan(
            model,
            target_bpw=target,
            options=options,
            check=False,
            device=device,
            on_event=listener,
            trust_remote_code=trust_remote_code,
        )
    say(f"plan: {plan.describe()}")
    return recipe_from_plan(plan, model, recipe, trust_remote_code=trust_remote_code, say=say)


def _text(recipe: Recipe) -> dict[str, Any]:
    """The recipe's calibration text; how much of it is read for scores is the plan's own affair, but never more."""
    own = recipe.calibration
    return {
        "source": own.source,
        "seed": own.seed,
        "bos": own.bos,
        "template": own.template,
        "samples": min(32, own.samples),
        "seqlen": None if own.seqlen is None else min(512, own.seqlen),
    }
