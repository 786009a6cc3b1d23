"""`quantize`: the one call behind the command line and pipelines."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from calib.data.tokens import Calibration
from calib.runner.activation_store import Offload
from ptq.errors import UsageError, unknown_name
from ptq.methods import LayerMethod, WindowMethod, find_method
from ptq.number_formats import find_number_format
from ptq.pipeline.dry_run.forecast import Forecast
from ptq.pipeline.dry_run.forecast import forecast as make_forecast
from ptq.pipeline.events import Listener, ignore_events
from ptq.pipeline.job import Job
from ptq.pipeline.preparation.preflight import resolve_device
from ptq.pipeline.prepare import Request, prepare
from ptq.pipeline.run import execute
from ptq.presets import check_places, with_preset
from ptq.recipe import CONTAINER_NAMES, Recipe
from ptq.recipe_files.other_names import other_name
from ptq.report import Report
from ptq.scheme import Scheme

__all__ = ["default_output", "forecast", "make_recipe", "quantize", "resolve_device"]

_CALIBRATION_FIELDS = {
    "calib": "source",
    "calib_samples": "samples",
    "calib_seqlen": "seqlen",
    "calib_bos": "bos",
    "calib_template": "template",
    "seed": "seed",
}


def quantize(
    model: str | os.PathLike[str] | nn.Module,
    recipe: Recipe | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | None = None,
    device: str = "auto",
    on_event: Listener | None = None,
    trust_remote_code: bool = False,
    offload: Offload = "auto",
    restart: bool = False,
    **fields: Any,
) -> Report:
    """Quantize a causal language model and write it as a Hugging Face folder.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, or a transformers model in memory (which is not changed).
        recipe: everything that decides the result; or give its parts as ``fields`` (see `make_recipe`), e.g.
            ``method="coreq", bits=3, group_size=64, calib="pydoc", beam=4``.
        out: output folder; default `default_output`. If it holds the finished result of the same recipe, model and
            calibration, nothing is done and its report is returned; another result is only replaced with ``restart``.
        tokenizer: needed with a model in memory, unless ``calibration`` is given.
        calibration: tokens to use instead of the recipe's calibration source.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:i``.
        on_event: called at every step (`ptq.pipeline.events`).
        trust_remote_code: run modelling code that ships with the model.
        offload: where the activations of the calibration data are kept between blocks: ``none`` (the device),
            ``memory``, ``disk`` (in the output folder), or ``auto``, the first of these with room.
        restart: start over, and replace a finished result; otherwise the same call goes on where an interrupted one
            stopped.

    Under ``torchrun`` or ``accelerate launch`` all processes make the same call: they share the work, the first one
    writes, all get the report.

    Returns:
        The report, which is also in the folder.

    Raises:
        PtqError: see `ptq.errors`.
    """
    prepared = prepare(
        _request(
            model,
            recipe,
            fields,
            out=out,
            tokenizer=tokenizer,
            calibration=calibration,
            device=device,
            listener=on_event or ignore_events,
            trust_remote_code=trust_remote_code,
            offload=offload,
            restart=restart,
            keep_finished=not restart,
        )
    )
    return prepared if isinstance(prepared, Report) else execute(prepared)


def forecast(
    model: str | os.PathLike[str] | nn.Module,
    recipe: Recipe | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | None = None,
    device: str = "auto",
    on_event: Listener | None = None,
    trust_remote_code: bool = False,
    offload: Offload = "auto",
    **fields: Any,
) -> Forecast:
    """What `quantize` with the same arguments would take and give, from a short measurement; writes nothing.

    Raises:
        PtqError: what `quantize` would refuse before it begins, or meet in the measured blocks.
    """
    prepared = prepare(
        _request(
            model,
            recipe,
            fields,
            out=out,
            tokenizer=tokenizer,
            calibration=calibration,
            device=device,
            listener=on_event or ignore_events,
            trust_remote_code=trust_remote_code,
            offload=offload,
        )
    )
    assert isinstance(prepared, Job)
    prepared.emit("measuring on the first blocks; nothing is written")
    return make_forecast(dataclasses.replace(prepared, listener=ignore_events))


def _request(
    model: str | os.PathLike[str] | nn.Module,
    recipe: Recipe | None,
    fields: Mapping[str, Any],
    *,
    out: str | os.PathLike[str] | None,
    **arguments: Any,
) -> Request:
    """The arguments of a call with its recipe and output folder settled.

    Raises:
        UsageError: A recipe and its parts are given, or a part does not exist.
    """
    if recipe is not None and fields:
        raise UsageError(f"give a recipe or its parts, not both: {', '.join(fields)}.")
    recipe = recipe if recipe is not None else make_recipe(fields, has_data=arguments.get("calibration") is not None)
    target = Path(out) if out is not None else default_output(model, recipe)
    return Request(model=model, recipe=recipe, given=fields.keys(), out=target, **arguments)


def make_recipe(fields: Mapping[str, Any], base: Recipe | None = None, *, has_data: bool = False) -> Recipe:
    """A recipe from flat names.

    Args:
        fields: names of `Recipe`, of `Scheme` (``bits``, ``symmetric``, ``group_size``, ``scale_dtype``, ``format``,
            ``act_format``, ...), ``preset`` (a name of `ptq.presets.PRESETS`: fields of the scheme; others given here
            win where the name leaves them open), ``calib``, ``calib_samples``, ``calib_seqlen``, ``calib_bos``,
            ``calib_template``, ``seed``, and options of the method (``beam``, ``damping``, ...).
        base: what the fields change; default ``Recipe()``.
        has_data: calibration data is given beside the fields.

    Raises:
        UsageError: a name that is none of these, or a value that does not fit.
    """
    base = base or Recipe()
    if fields.get("format") in CONTAINER_NAMES:
        fields = {"container" if name == "format" else name: value for name, value in fields.items()}
    check_places(fields)
    if "preset" in fields:
        fields = with_preset(fields)
    own = {field.name for field in dataclasses.fields(Recipe)} - {"scheme", "calibration", "options"}
    scheme_names = {field.name for field in dataclasses.fields(Scheme)}
    method = find_method(fields.get("method", base.method))
    option_names = {field.name for field in dataclasses.fields(method.config)}
    options = dict(base.options) if method.name == base.method else {}
    if isinstance(method, LayerMethod) and (has_data or "calib" in fields):
        options.update(method.with_data)
    options.update(fields.get("options", {}))
    parts: dict[str, dict[str, Any]] = {"scheme": {}, "calibration": {}, "recipe": {}}
    for name, value in fields.items():
        if name in own:
            parts["recipe"][name] = value
        elif name in scheme_names:
            parts["scheme"][name] = value
        elif name in _CALIBRATION_FIELDS:
            parts["calibration"][_CALIBRATION_FIELDS[name]] = value
        elif name in option_names:
            options[name] = value
        elif name != "options":
            answer = other_name("python", name)
            if answer is not None:
                raise UsageError(f"unknown argument {name!r}. {answer}")
            raise unknown_name(
                "argument", name, own | scheme_names | set(_CALIBRATION_FIELDS) | {"preset"} | option_names
            )
    return dataclasses.replace(
        base,
        scheme=_scheme(base, method, parts["scheme"]),
        calibration=dataclasses.replace(base.calibration, **parts["calibration"]),
        options=options,
        **parts["recipe"],
    )


def _scheme(base: Recipe, method: LayerMethod | WindowMethod, given: Mapping[str, Any]) -> Scheme:
    """The base's scheme with what is given; another method or number format brings its own defaults along."""
    start = dict(method.defaults) if method.name != base.method else {}
    own = start.get("format", base.scheme.format)
    name = given.get("format", own)
    if name != own:  # the method's defaults are those of its own format
        start |= {**find_number_format(name).defaults, "format": name}
    elif name != base.scheme.format:
        start = {**find_number_format(name).defaults, **start}
    return dataclasses.replace(base.scheme, **{**start, **given})


def default_output(model: str | os.PathLike[str] | nn.Module, recipe: Recipe) -> Path:
    """Where the result goes when nothing is said: in the current folder,
    ``<model>-<method>-<number format>[-a<bits>][-kv<bits>]``, e.g. ``SmolLM2-coreq-int3-sym-g64``."""
    name = type(model).__name__ if isinstance(model, nn.Module) else Path(model).resolve().name.removesuffix(".gguf")
    stored = recipe.scheme.describe().replace("per channel", "pc").replace(" ", "-")
    extra = "" if recipe.kv_bits is None else f"-kv{recipe.kv_bits}"
    return Path(f"{name}-{recipe.method}-{stored}{extra}")
