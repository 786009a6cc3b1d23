"""`quantize`: the one call behind the command line and pipelines."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calib.checkpoint.config import check_tokenizer_config
from calib.checkpoint.reader import ModelSource, open_model
from calib.data.bos import window_bos
from calib.data.tokens import Calibration, load_calibration, sample_from_model
from calib.distributed import init_distributed
from calib.model.model_class import find_model_class, is_multimodal
from calib.model.structure import find_blocks
from calib.runner.activation_store import OFFLOADS, Offload
from calib.runner.forward import pass_dtype
from ptq.checkpoint.writer import check_output_folder
from ptq.errors import ModelError, PtqError, UsageError, unknown_name
from ptq.learning import LearnedConfig
from ptq.methods import LayerMethod, WindowMethod, find_method, make_config
from ptq.number_formats import find_number_format
from ptq.pipeline.dry_run.forecast import Forecast
from ptq.pipeline.dry_run.forecast import forecast as make_forecast
from ptq.pipeline.dry_run.rough_time import long_run_notices
from ptq.pipeline.dry_run.windows import Surroundings, check_learning
from ptq.pipeline.events import Event, Listener, ignore_events
from ptq.pipeline.preparation.effects import without_effect
from ptq.pipeline.preparation.finished import find_finished
from ptq.pipeline.preparation.preflight import check_path_names, check_vocabulary
from ptq.pipeline.preparation.rotated_assignment import rotate_last_inputs
from ptq.pipeline.preparation.scheme_assignment import make_plan
from ptq.pipeline.run import Run
from ptq.proof import settle_format
from ptq.recipe import CONTAINER_NAMES, CalibrationSpec, Recipe
from ptq.recipe_files.other_names import other_name
from ptq.report import Report
from ptq.scheme import KeyValueScheme, Scheme
from ptq.transforms.rotation.residual import rotate_residual

__all__ = [
    "default_output",
    "forecast",
    "load_tokenizer",
    "make_recipe",
    "quantize",
    "read_calibration",
    "resolve_device",
]

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
    run, tokenizer = _prepare(
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
    return run if isinstance(run, Report) else run.execute(tokenizer)


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
    run, _ = _prepare(
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
        restart=False,
        keep_finished=False,
    )
    assert isinstance(run, Run)
    run.emit(Event("message", "measuring on the first blocks; nothing is written"))
    run.emit = ignore_events
    return make_forecast(run)


def _prepare(
    model: str | os.PathLike[str] | nn.Module,
    recipe: Recipe | None,
    fields: Mapping[str, Any],
    *,
    out: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration | None,
    device: str,
    listener: Listener,
    trust_remote_code: bool,
    offload: Offload,
    restart: bool,
    keep_finished: bool,
) -> tuple[Run | Report, PreTrainedTokenizerBase | None]:
    """Check everything, in the order of what it costs; open the model and the calibration text.

    Returns:
        The run, or the report of a finished result that is what the run would make, if ``keep_finished``; the
        tokenizer.
    """
    if recipe is not None and fields:
        raise UsageError(f"give a recipe or its parts, not both: {', '.join(fields)}.")
    recipe = recipe if recipe is not None else make_recipe(fields)
    if offload not in OFFLOADS:
        raise unknown_name("offload", offload, OFFLOADS)
    method = find_method(recipe.method)
    config = make_config(method, recipe.options)
    target = Path(out) if out is not None else default_output(model, recipe)
    check_path_names(*([target] if isinstance(model, nn.Module) else [model, target]))
    check_output_folder(target)
    finished = find_finished(target) if keep_finished else None
    if finished is not None:
        finished.refuse_other_recipe(recipe)
    workers, torch_device = init_distributed(resolve_device(device))
    source = open_model(
        model if isinstance(model, nn.Module) else os.fspath(model),
        trust_remote_code=trust_remote_code,
        text_only=recipe.text_only,
    )
    _check_parts(source, recipe)
    if isinstance(config, LearnedConfig):
        config.windows(len(find_blocks(source.skeleton)))  # refused before anything is read
    make_plan(source.skeleton, recipe, source.dtype)  # likewise
    listener = listener if workers.is_main_process else ignore_events
    finished = None if finished is None or not finished.is_whole(listener) else finished
    for name, reason in without_effect(fields, recipe).items():
        listener(Event("message", f"{name} has no effect: {reason}"))
    if source.quantization is not None:
        listener(Event("message", source.quantization.describe()))
    if recipe.text_only and not source.companions.text_only:
        listener(Event("message", f"--text-only has no effect: {source.name} is a text model"))
    dtype = pass_dtype(recipe.compute_dtype, source.dtype, torch_device)
    source = _rotated(source, recipe, listener)
    plan = make_plan(source.skeleton, recipe, source.dtype)
    if "down" in recipe.rotate:
        plan = rotate_last_inputs(plan, source, recipe.calibration.seed, torch_device, dtype)
    kv = None if recipe.kv_bits is None else KeyValueScheme(recipe.kv_bits, recipe.kv_symmetric)
    settled = (
        [settle_format(recipe.container, plan.schemes, source, kv, trust_remote_code=trust_remote_code)]
        if workers.is_main_process
        else []
    )
    (choice,) = workers.broadcast_object(settled)
    needs_data = isinstance(method, WindowMethod) or bool(method.needs(config))
    if finished is not None and (calibration is not None or not finished.needs_tokens(recipe)):
        return finished.kept(source.fingerprint(), calibration if needs_data else None, listener), tokenizer
    tokenizer = tokenizer or load_tokenizer(source, trust_remote_code, required=needs_data and calibration is None)
    if needs_data and torch_device.type == "cpu":
        spec = recipe.calibration
        shape = (spec.samples, spec.seqlen) if calibration is None else tuple(calibration.tokens.shape)
        for notice in long_run_notices(source.skeleton, plan, method, config, *shape):
            listener(Event("message", notice))
    if not needs_data:
        calibration = None
    elif calibration is None and workers.is_main_process:
        calibration = read_calibration(source, recipe.calibration, tokenizer, listener, trust_remote_code)
    calibration = workers.broadcast_object(calibration)  # all processes work on the first one's tokens
    if finished is not None:
        return finished.kept(source.fingerprint(), calibration, listener), tokenizer
    if calibration is not None:
        check_vocabulary(source.skeleton, calibration.tokens)
    if isinstance(config, LearnedConfig) and calibration is not None:
        check_learning(source, config, calibration.tokens, Surroundings(torch_device, dtype, workers.size))
    run = Run(
        source,
        plan,
        recipe,
        method,
        config,
        calibration,
        target,
        choice,
        device=torch_device,
        dtype=dtype,
        listener=listener,
        offload=offload,
        restart=restart,
        workers=workers,
    )
    return run, tokenizer


def _check_parts(source: ModelSource, recipe: Recipe) -> None:
    """Refuse what cannot be done to a model that is written whole.

    Raises:
        ModelError: the residual stream is to be rotated, into which images enter.
    """
    if "residual" in recipe.rotate and is_multimodal(source.skeleton):
        raise ModelError(
            f"{type(source.skeleton).__name__} reads more than text, and what its other parts put into the residual "
            f"stream would not be rotated: leave out --rotate residual, or write the text part alone (--text-only)."
        )


def make_recipe(fields: Mapping[str, Any], base: Recipe | None = None) -> Recipe:
    """A recipe from flat names.

    Args:
        fields: names of `Recipe`, of `Scheme` (``bits``, ``symmetric``, ``group_size``, ``scale_dtype``), ``calib``,
            ``calib_samples``, ``calib_seqlen``, ``calib_bos``, ``calib_template``, ``seed``, and options of the method
            (``beam``, ``damping``, ...).
        base: what the fields change; default ``Recipe()``.

    Raises:
        UsageError: a name that is none of these, or a value that does not fit.
    """
    base = base or Recipe()
    own = {field.name for field in dataclasses.fields(Recipe)} - {"scheme", "calibration", "options"}
    scheme_names = {field.name for field in dataclasses.fields(Scheme)}
    method = find_method(fields.get("method", base.method))
    option_names = {field.name for field in dataclasses.fields(method.config)}
    options = dict(base.options) if method.name == base.method else {}
    options.update(fields.get("options", {}))
    parts: dict[str, dict[str, Any]] = {"scheme": {}, "calibration": {}, "recipe": {}}
    if fields.get("format") in CONTAINER_NAMES:
        fields = {"container" if name == "format" else name: value for name, value in fields.items()}
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
            raise unknown_name("argument", name, own | scheme_names | set(_CALIBRATION_FIELDS) | option_names)
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
    name = given.get("format", start.get("format", base.scheme.format))
    if name != base.scheme.format:
        start = {**find_number_format(name).defaults, **start, "format": name}
    return dataclasses.replace(base.scheme, **{**start, **given})


def default_output(model: str | os.PathLike[str] | nn.Module, recipe: Recipe) -> Path:
    """Where the result goes when nothing is said: in the current folder,
    ``<model>-<method>-<number format>[-a<bits>][-kv<bits>]``, e.g. ``SmolLM2-coreq-int3-sym-g64``."""
    name = type(model).__name__ if isinstance(model, nn.Module) else Path(model).resolve().name.removesuffix(".gguf")
    stored = recipe.scheme.describe().replace("per channel", "pc").replace(" ", "-")
    extra = "" if recipe.kv_bits is None else f"-kv{recipe.kv_bits}"
    return Path(f"{name}-{recipe.method}-{stored}{extra}")


def resolve_device(device: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:i`` as a device that is there.

    Raises:
        UsageError: another name, or a GPU that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:0, cuda:1, ...") from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} is not supported: use auto, cpu, cuda or cuda:i.")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise UsageError(f"there is no device {device!r}: this machine shows {count} CUDA device(s) to PyTorch.")
    return found


def _rotated(source: ModelSource, recipe: Recipe, listener: Listener) -> ModelSource:
    """The model with its residual stream rotated, where the recipe says so."""
    if "residual" not in recipe.rotate:
        return source
    listener(Event("message", "rotating the residual stream: norm gains go into the linears that read them"))
    rotated = rotate_residual(source, recipe.calibration.seed)
    for note in rotated.notes:
        listener(Event("message", note))
    return rotated


def load_tokenizer(source: ModelSource, trust_remote_code: bool, *, required: bool) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; ``None`` for a model in memory or where it is not needed and not there."""
    path = Path(source.name)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if source.folder is not None and required:
            check_tokenizer_config(source.folder, trust_remote_code=trust_remote_code)
            return AutoTokenizer.from_pretrained(
                source.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except PtqError:
        raise
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        raise ModelError(f"{source.name} has no tokenizer that can be read: {error}") from error
    if required:
        raise UsageError("a model in memory needs tokenizer=... or calibration=... to be calibrated.")
    return None


def read_calibration(
    source: ModelSource,
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    listener: Listener,
    trust_remote_code: bool,
) -> Calibration:
    """The tokens that a specification describes; the listener gets what a reader must know of them.

    Raises:
        PtqError: the text cannot be read, or is too short.
    """
    listener(Event("message", f"calibration: {spec.samples} x {spec.seqlen} tokens of {spec.source}, seed {spec.seed}"))

    def sample(samples: int, seqlen: int, seed: int) -> Tensor:
        whole = _whole_model(source, trust_remote_code)
        # auto: the tokenizer's BOS, else what the model's config names, which is how it writes from nothing
        first = window_bos(tokenizer, spec.bos, "--calib-bos")
        own = spec.bos == "auto" and first is None
        return sample_from_model(whole, samples, seqlen, seed, bos="config" if own else first)

    context = getattr(source.skeleton.config.get_text_config(), "max_position_embeddings", None)
    calibration = load_calibration(
        spec.source,
        tokenizer,
        samples=spec.samples,
        seqlen=spec.seqlen,
        seed=spec.seed,
        context=context,
        sampler=sample,
        bos=spec.bos,
        template=spec.template,
    )
    if calibration.bos:
        listener(Event("message", "calibration: every sequence begins with BOS"))
    for note in calibration.notes:
        listener(Event("message", f"calibration: {note}"))
    return calibration


def _whole_model(source: ModelSource, trust_remote_code: bool) -> Any:
    """The full-precision model in memory, for sampling from it."""
    if source.folder is None or source.quantization is not None or source.companions.text_only:
        source.load(source.tensor_names())
        return source.skeleton
    found: Any = find_model_class(source.skeleton.config, trust_remote_code=trust_remote_code)
    model: Any = found.from_pretrained(
        source.folder, dtype="auto", trust_remote_code=trust_remote_code, use_safetensors=True, local_files_only=True
    )
    return model.eval()
