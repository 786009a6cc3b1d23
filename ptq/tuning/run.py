"""`tune`: a finished result with tuned norms, as a new folder."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from calib.checkpoint.atomic_files import os_errors, write_json
from calib.checkpoint.files import stored_tensors
from calib.data.tokens import Calibration
from ptq.checkpoint.card import add_card
from ptq.checkpoint.companions import copy_companions, find_companions
from ptq.checkpoint.writer import CheckpointWriter, check_new_folder
from ptq.containers.compressed_tensors import COMPRESSED_TENSORS
from ptq.containers.native import NATIVE
from ptq.errors import ModelError, UsageError
from ptq.export.result import Result
from ptq.integration.loading import load
from ptq.pipeline.events import Event, Listener, ignore_events
from ptq.pipeline.preparation.calibration import longest_context
from ptq.pipeline.preparation.preflight import check_disk, resolve_device
from ptq.report import Report
from ptq.tuning.config import TuneConfig
from ptq.tuning.training import Learned, train

__all__ = ["TuneResult", "tune"]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Of tensors that may be tuned, by their names in safetensors."""


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """What `tune` did.

    Args:
        report: Of the new folder; its ``environment`` holds ``tuning``.
        kl_before: Mean KL in nats per token of the sequences held out, of the result as it was.
        kl_after: The same of the new folder; never above.
    """

    report: Report
    kl_before: float
    kl_after: float


def tune(
    result: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    calibration: Calibration,
    reference: str | os.PathLike[str] | None = None,
    config: TuneConfig | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: Listener | None = None,
) -> TuneResult:
    """Tune the norms of a result end to end, so that it gives the full-precision model's distribution of tokens.

    No packed weight changes and no byte is added, so it goes with every method, number format, transform and plan, and
    readers of the container need nothing new. Both models must fit in memory.

    Args:
        result: An output folder of `ptq.quantize` in a container with packed weights.
        out: The new folder, which must be empty.
        calibration: Tokens to learn from, an eighth of which decides what is kept.
        reference: The full-precision model; default the one that the report names.
        config: Options.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:i``.
        overwrite: Replace an earlier output of ptq there.
        trust_remote_code: Run modelling code that ships with the model.
        on_event: Called at every step.

    Raises:
        UsageError: No reference, a result whose inputs are rounded, too few sequences.
        OutputError: The result is damaged, or the target is in use.
        NumericalError: The result's loss is not finite.
    """
    source, target, listener = Path(result), Path(out), on_event or ignore_events
    start, config = time.monotonic(), config or TuneConfig()
    if source.suffix == ".gguf" and source.is_file():
        raise UsageError(f"{source} is a file for llama.cpp: tune the folder that it was made from ({source.stem}).")
    check_new_folder(source, target, overwrite=overwrite)
    opened = Result(source, trust_remote_code=trust_remote_code)
    if opened.container not in (NATIVE, COMPRESSED_TENSORS):
        raise UsageError(
            f"{source} is in the container {opened.container.name}, which ptq does not tune: tune the result it was "
            f"exported from, or what `ptq export {source} --format native` makes of it, and export that."
        )
    rounded = next((name for name, scheme in opened.schemes.items() if scheme.rounds_input), None)
    if rounded is not None or opened.key_values is not None:
        what = "keys and values are" if rounded is None else f"the input of {rounded} is"
        raise UsageError(f"{what} rounded at run time, and no gradient passes that: tune results of weights alone.")
    place = resolve_device(device)
    context = longest_context(opened.skeleton)
    if context is not None and calibration.tokens.shape[1] > context:
        raise UsageError(
            f"sequences of {calibration.tokens.shape[1]} tokens exceed the model's context of {context}: lower "
            f"--calib-seqlen."
        )
    wanted = _reference(opened, reference)
    listener(Event("message", f"tuning the norms of {source} towards {wanted}"))
    model: Any = load(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model = model.to(place).eval()
    full = _full_precision(wanted, place, opened, trust_remote_code=trust_remote_code)
    stored = {name: _DTYPES[one.dtype] for name, one in stored_tensors(source).items() if one.dtype in _DTYPES}
    learned = train(
        model,
        full,
        calibration.tokens,
        config,
        stored=stored,
        on_progress=lambda done, steps, loss: listener(
            Event("block_done", name=f"KL {loss:.4f}", done=done, total=steps)
            if done
            else Event("blocks", text=f"{steps} steps", total=steps)
        ),
    )
    del model, full
    if not learned.steps:
        listener(Event("message", "nothing lowered the loss of the sequences held out: the norms stay as they are"))
    report = _write(opened, target, learned, config, calibration, start, listener)
    return TuneResult(report, learned.before, learned.after)


def _reference(result: Result, given: str | os.PathLike[str] | None) -> str:
    """The full-precision model.

    Raises:
        UsageError: None is given, and the report's is not there.
    """
    name = os.fspath(given) if given is not None else str(result.report.model["source"])
    if given is None and not Path(name).is_dir():
        raise UsageError(
            f"{result.folder} was made of {name}, which is not a folder here: name the full-precision model "
            "(--reference MODEL)."
        )
    return name


def _full_precision(name: str, place: torch.device, result: Result, *, trust_remote_code: bool) -> Any:
    """The model that is imitated, where it runs.

    Raises:
        ModelError: It cannot be loaded.
        UsageError: It has other sizes than the result.
    """
    dtype = torch.float32 if place.type == "cpu" else "auto"
    try:
        full: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except Exception as error:  # transformers and its hub raise errors of many kinds
        line = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"the full-precision model {name} cannot be loaded: {type(error).__name__}: {line}") from error
    sizes, wanted = (_sizes(config) for config in (full.config, result.skeleton.config))
    if sizes != wanted:
        raise UsageError(f"{name} is another model than {result.folder} was made of: {sizes} instead of {wanted}.")
    return full.to(place).eval().requires_grad_(False)


def _sizes(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}


def _write(
    result: Result,
    out: Path,
    learned: Learned,
    config: TuneConfig,
    calibration: Calibration,
    start: float,
    listener: Listener,
) -> Report:
    """The new folder: everything as it was, with other norms."""
    check_disk(out, sum(path.stat().st_size for path in result.files))
    with CheckpointWriter(out) as checkpoint:
        for path in result.files:
            with os_errors(path, "read"):
                tensors: dict[str, Tensor] = load_file(path)
            own = {name: value.cpu().contiguous() for name, value in learned.values.items() if name in tensors}
            checkpoint.write_part(path.stem, tensors | own)
        copy_companions(find_companions(result.folder, out, code=result.trust_remote_code), checkpoint.companions)
        quantization = result.config["quantization_config"]
        for name, content in result.container.files(quantization).items():
            write_json(checkpoint.companions / name, content)
        report = _report(result, checkpoint, learned, config, calibration, time.monotonic() - start)
        report, left = add_card(checkpoint, report, result.folder)
        if left is not None:
            listener(Event("message", left))
        checkpoint.finish(result.plain_config, quantization, report)
    return report


def _report(
    result: Result,
    checkpoint: CheckpointWriter,
    learned: Learned,
    config: TuneConfig,
    calibration: Calibration,
    seconds: float,
) -> Report:
    """The result's report, with what tuning did."""
    tuning = {
        **dataclasses.asdict(config),
        "kl_before": learned.before,
        "kl_after": learned.after,
        "steps": learned.steps,
        "sequences_held_out": learned.held_out,
        "parameters": sum(value.numel() for value in learned.values.values()),
        "calibration": calibration.describe(),
        "seconds": seconds,
    }
    return dataclasses.replace(
        result.report,
        totals={**result.report.totals, "file_bytes": checkpoint.weight_bytes},
        environment={**result.report.environment, "tuning": tuning},
        files=checkpoint.files(),
        companions=tuple(checkpoint.companion_names()),
    )
