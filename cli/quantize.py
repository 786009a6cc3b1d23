"""``ptq quantize``: flags to a recipe, a call of `ptq.quantize`, and a summary."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.shared.gguf_output import gguf_recipe, is_gguf, result_folder
from cli.shared.method_flags import method_flags
from cli.shared.plan_flags import plan_flags, planned_formats, planned_output, planned_recipe

if TYPE_CHECKING:
    from ptq.pipeline.dry_run.forecast import Forecast
    from ptq.recipe import Recipe
    from ptq.report import Report

__all__ = ["command"]


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    help="Output folder, or a .gguf file for llama.cpp.  [default: <model>-<method>-<number format>]",
)
@click.option("--method", metavar="NAME", help="Quantization method; ptq methods lists them.  [default: coreq]")
@click.option(
    "--format",
    metavar="NAME",
    help="Number format of weights: int, nvfp4, mxfp4, mxfp8, fp8, e2m1, q4_k, ...; ptq methods lists them and which "
    "methods take each.  [default: int]",
)
@click.option(
    "--preset",
    metavar="NAME",
    help="Formats of weights and activations by the names of compressed-tensors: NVFP4, NVFP4A16, MXFP4, FP8, "
    "FP8_DYNAMIC, W4A16, W8A8, ...; what contradicts the name is refused.",
)
@click.option("--bits", type=int, help="Bits of a code, 2 to 8.  [default: 3]")
@click.option(
    "--group-size", type=int, help="Input channels per scale; 0 is one scale per output channel.  [default: 64]"
)
@click.option(
    "--sym/--asym",
    "symmetric",
    default=None,
    help="Symmetric quantization, or asymmetric with a zero point.  [default: sym]",
)
@click.option(
    "--scale-dtype",
    metavar="DTYPE",
    help="Data type of the scales: auto (the model's), float16 or bfloat16.  [default: auto]",
)
@click.option(
    "--calib",
    metavar="SOURCE",
    help="Calibration data: a .txt, .jsonl, .json or .parquet file, wikitext2, c4, REPO:SPLIT:FIELD, pydoc or "
    "self.  [default: c4]",
)
@click.option("--calib-samples", type=int, metavar="N", help="Number of calibration sequences.  [default: 128]")
@click.option(
    "--calib-seqlen",
    type=int,
    metavar="T",
    help="Tokens per calibration sequence; the default is cut to the context of a model.  [default: 2048]",
)
@click.option(
    "--calib-bos",
    metavar="auto|always|never",
    help="Prepend BOS to every sequence. auto: if the tokenizer adds BOS to a text.  [default: auto]",
)
@click.option(
    "--calib-template",
    metavar="auto|always|never",
    help="Apply the chat template to rows of messages; never: plain text; always: reject other rows.  [default: auto]",
)
@click.option("--seed", type=int, help="Random seed of the calibration sequences.  [default: 0]")
@click.option(
    "--act-bits",
    type=int,
    metavar="N",
    help="Quantize activations (inputs of linears) per token (llm-fp4: statically); 0 or 16: off.  [default: 0]",
)
@click.option(
    "--act-format",
    metavar="NAME",
    help="Format of activations in the place of --act-bits: nvfp4, mxfp4, mxfp8, fp8 (dynamic, per token), fp8-tensor "
    "(static, from calibration), ...; ptq methods lists them; none to undo a recipe's.",
)
@click.option(
    "--act-sym/--act-asym",
    "act_symmetric",
    default=None,
    help="Symmetric or asymmetric activations.  [default: act-asym]",
)
@click.option(
    "--kv-bits", type=int, metavar="N", help="Quantize the KV cache per token and head; 0: off.  [default: 0]"
)
@click.option(
    "--kv-sym/--kv-asym", "kv_symmetric", default=None, help="Symmetric or asymmetric KV cache.  [default: kv-asym]"
)
@click.option(
    "--rotate",
    multiple=True,
    metavar="auto|none|residual[,input|down]",
    help="Hadamard rotations against outliers. residual: of the residual stream, merged into the weights (QuaRot, "
    "SpinQuant R1); input: online, of the inputs of every linear; down: online, of the inputs of down_proj (SpinQuant "
    "R4); auto: residual and down as far as model and container carry them at no byte.  [default: none]",
)
@click.option(
    "--rotate-block",
    type=int,
    metavar="N",
    help="Block size of online Hadamard rotations, 32 to 1024.  [default: 256; down: the largest that divides]",
)
@click.option(
    "--rotate-head",
    type=click.Choice(["auto", "online", "merged"]),
    help="With --rotate residual and a head tied to the embedding. online: stays tied, two small rotations per token "
    "at run time (native container only); merged: a tensor of its own.  [default: auto, online where it can be stored]",
)
@method_flags
@click.option("-O", "--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the method; repeatable.")
@click.option(
    "--override",
    "overrides",
    multiple=True,
    metavar="PATTERN=bits|format[,gN][,asym][,aN|a-NAME]",
    help="Different scheme for matching linears, e.g. '*.down_proj=4,g32,a8' (a8: inputs of 8 bits, a0: inputs as "
    "they are) or '*.o_proj=fp4'; repeat, the first match wins.",
)
@plan_flags
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Linears to leave unquantized; repeatable.")
@click.option(
    "--recipe", "recipe_file", metavar="FILE.yaml", help="YAML recipe; options on the command line override it."
)
@click.option(
    "--text-only/--whole",
    "text_only",
    default=None,
    help="For a multimodal model: write only the language model, or the whole model.  [default: whole]",
)
@click.option(
    "--dtype", metavar="DTYPE", help="Data type of the calibration forward passes: auto, float32, bfloat16 or float16."
)
@click.option("--container", metavar="NAME", help="auto, compressed-tensors, native, gptq or awq.  [default: auto]")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Device to run on.")
@click.option("--restart", is_flag=True, help="Discard an interrupted run or a finished result and start over.")
@click.option(
    "--offload",
    default="auto",
    metavar="PLACE",
    help="Where to keep activations between blocks: none (on the device), memory, disk, or auto (the first with room).",
)
@click.option("--dry-run", is_flag=True, help="Check everything and estimate size, time and memory; write nothing.")
@click.option("--trust-remote-code", is_flag=True, help="Allow running Python code from the model repository.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the report as JSON on stdout (docs/json.md) and nothing else."
)
def command(
    model: str,
    out: str | None,
    recipe_file: str | None,
    device: str,
    offload: str,
    dry_run: bool,
    restart: bool,
    trust_remote_code: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Quantize MODEL: a local Hugging Face folder, a hub id or a .gguf file.

    \b
    Examples:
      ptq quantize --method coreq --bits 3 MODEL -o OUT
      ptq quantize --bits 4 --asym --group-size 32 MODEL
      ptq quantize --bits 2 --beam 4 --calib my_text.txt --calib-samples 64 MODEL
      ptq quantize --bits 4 --act-bits 8 --kv-bits 8 --override '*.down_proj=8,a0' MODEL
      ptq quantize --override '*.down_proj=4' --ignore '*.layers.0.*' MODEL
      ptq quantize --method gptq --format nvfp4 --act-format nvfp4 MODEL
      ptq quantize --method rtn --preset FP8_DYNAMIC MODEL
      ptq quantize --method coreq --plan plan.yaml MODEL
      ptq quantize --recipe recipe.yaml --seed 1 MODEL -o OUT-seed1
      ptq quantize --method coreq --format q3_k MODEL -o MODEL.gguf
      ptq quantize --dry-run MODEL
      torchrun --nproc-per-node 4 --no-python ptq quantize MODEL -o OUT

    Killed at any moment, the same command goes on where it was (--restart starts over). A finished result of another
    recipe or model is only replaced with --restart.
    """
    import ptq
    from calib.distributed import destroy_distributed
    from cli.shared.idle import idle_sentences
    from cli.shared.recipe_flags import build_recipe
    from cli.shared.terminal.progress import ProgressListener
    from cli.shared.terminal.screen import console
    from ptq.api import default_output
    from ptq.export import export
    from ptq.recipe import Recipe

    base = Recipe.from_yaml(recipe_file) if recipe_file else Recipe()
    recipe = build_recipe(base, flags)
    file = out if is_gguf(out) else None
    if file is not None:
        recipe, out = gguf_recipe(model, recipe, file, restart=restart), str(result_folder(file))
    target = Path(out) if out else planned_output(model, recipe, flags) or default_output(model, recipe)
    is_main_process = int(os.environ.get("RANK", "0")) == 0  # of several processes one writes to the terminal
    run: dict[str, Any] = {"out": target, "device": device, "offload": offload, "trust_remote_code": trust_remote_code}
    with ProgressListener(console(stderr=True)) as listener:
        if is_main_process:
            formats = planned_formats(flags) or recipe.scheme.describe()
            listener.say(f"{recipe.method}, {formats}: {model} -> {target}")
            if base.options and recipe.method != base.method:
                listener.say(f"options of {base.method} in {recipe_file} do not apply to {recipe.method}: left out")
            for sentence in idle_sentences(*_idle(recipe, flags, restart and dry_run)):
                listener.say(sentence)
        recipe = planned_recipe(model, recipe, flags, listener, device=device, trust_remote_code=trust_remote_code)
        if dry_run:
            result: Report | Forecast = ptq.forecast(model, recipe, on_event=listener, **run)
        else:
            result = ptq.quantize(model, recipe, restart=restart, on_event=listener, **run)
        if file is not None and is_main_process and not dry_run:
            export(target, format="gguf", out=file, overwrite=restart, on_event=listener)
            listener.say(f"{file} is written; its result is in {target}")
    destroy_distributed()
    if is_main_process and (as_json or dry_run or not listener.found_finished):
        _show(result, target, as_json=as_json)


def _show(result: Report | Forecast, target: Path, *, as_json: bool) -> None:
    from cli.shared.forecast import show_forecast
    from cli.shared.tables import show_summary
    from cli.shared.terminal.screen import console, echo
    from ptq.report import Report

    if isinstance(result, Report):
        if as_json:
            echo(result.to_json(), newline=False)
        else:
            show_summary(result, target, console())
    elif as_json:
        echo(json.dumps(result.to_dict(), indent=1))
    else:
        show_forecast(result, console())


def _idle(recipe: Recipe, flags: Mapping[str, Any], restarts_nothing: bool) -> tuple[dict[str, str], dict[str, str]]:
    """The options that were given, and why some of them have no effect."""
    from cli.shared.idle import given_options
    from ptq.pipeline.preparation.effects import without_effect

    given = given_options(click.get_current_context())
    if "dtype" in given:
        given["compute_dtype"] = given.pop("dtype")
    keys = [text.partition("=")[0].strip().replace("-", "_") for text in flags.get("options", ())]
    given |= {key: f"-O {key}" for key in keys}
    reasons = without_effect(given, recipe)
    return given, reasons | ({"restart": "--dry-run writes nothing"} if restarts_nothing else {})
