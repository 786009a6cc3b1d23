"""The end of a run: companions of the weights, the config and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from calib.checkpoint.atomic_files import write_json
from ptq.checkpoint.card import add_card
from ptq.checkpoint.companions import copy_companions, find_companions
from ptq.checkpoint.writer import CheckpointWriter
from ptq.containers.native import with_residual_rotation
from ptq.containers.select import CONTAINERS
from ptq.errors import UsageError
from ptq.pipeline.job import Job
from ptq.pipeline.preparation.container import online_rotation
from ptq.pipeline.preparation.preflight import peak_memory
from ptq.pipeline.preparation.sizes import dense_experts
from ptq.report import PartRecord, Report
from ptq.runtime.products import product_rows
from ptq.scheme import Scheme

__all__ = ["finish"]

_IDLE_WINDOWS = 4  # one in so many is worth a sentence


def finish(job: Job, checkpoint: CheckpointWriter, total: PartRecord) -> Report:
    """Write everything that lies beside the weights, and move the result into place.

    Args:
        job: The run.
        checkpoint: The output folder with all parts.
        total: All parts as one, with what the whole run took; warnings are added.
    """
    _copy_companions(job, checkpoint)
    unused = job.source.unused()
    if unused:
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        job.warn(total, f"{len(unused)} tensors of the checkpoint are no part of the model, left out: {shown}")
    job.warn(total, *_idle_windows(total.windows))
    job.warn(total, *dense_experts(total.kept.values(), sum(r.payload_bytes for r in total.layers)))
    schemes = {record.name: Scheme.from_dict(record.scheme) for record in total.layers}  # as applied, not as planned
    quantization = _quantization_config(job, schemes)
    for name, content in CONTAINERS[job.container.name].files(quantization).items():
        write_json(checkpoint.companions / name, content)
    report, note = add_card(checkpoint, _report(job, checkpoint, total), job.source.folder)
    if note is not None:
        job.emit(note)
    checkpoint.finish(_model_config(job), quantization, report)
    return report


def _copy_companions(job: Job, checkpoint: CheckpointWriter) -> None:
    if job.source.folder is None:
        generation = getattr(job.source.skeleton, "generation_config", None)
        for companion in (job.tokenizer, generation):
            if companion is not None:
                companion.save_pretrained(checkpoint.companions)
        return
    rule = job.source.companions
    found = find_companions(job.source.folder, job.out, code=rule.code, text_only=rule.text_only)
    copy_companions(found, checkpoint.companions)
    for note in found.notes():
        job.emit(note)


def _idle_windows(windows: list[dict[str, Any]]) -> list[str]:
    """A sentence if many windows were put back to where they began."""
    idle = sum(not row["accepted"] for row in windows)
    if idle * _IDLE_WINDOWS < len(windows) or not idle:
        return []
    return [
        f"{idle} of {len(windows)} windows kept what they started from, because learning did not lower the loss on the "
        f"sequences that decide: more calibration data (--calib-samples) help most, then more steps (--iters)"
    ]


def _quantization_config(job: Job, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    # Modules that a reader other than transformers may have for tensors that are no part of the model.
    carried = [
        name.removesuffix(".weight")
        for name, tensor in job.source.carried().items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    ]
    container = CONTAINERS[job.container.name]
    config = container.quantization_config(schemes, job.linears, key_values=job.key_values, others=carried)
    return with_residual_rotation(config, online_rotation(job.source))


def _model_config(job: Job) -> dict[str, Any]:
    config = job.source.stored_config()
    architectures = config.get("architectures") or [type(job.source.skeleton).__name__]
    changes = CONTAINERS[job.container.name].config_changes(job.source.dtype)
    return {**config, "architectures": architectures, **job.source.config_changes, **changes}


def _report(job: Job, checkpoint: CheckpointWriter, total: PartRecord) -> Report:
    quantized = sum(r.shape[0] * r.shape[1] for r in total.layers)
    kept = tuple(sorted(total.kept.values(), key=lambda tensor: -tensor.bytes))
    payload = sum(r.payload_bytes for r in total.layers)
    totals = {
        "quantized_parameters": quantized,
        "kept_parameters": total.kept_parameters,
        "payload_bytes": payload,
        "kept_bytes": sum(tensor.bytes for tensor in kept),
        "file_bytes": checkpoint.weight_bytes,
        "source_bytes": (quantized + total.kept_parameters) * job.source.dtype.itemsize,
        "bits_per_weight": 8 * payload / quantized,
        "seconds": total.seconds,
    }
    measured = {"flops": total.flops, "offload": job.offload, "proofs": job.container.to_dict()}
    measured["products"] = _products(job, total)
    return Report(
        model=_describe_model(job, quantized + total.kept_parameters),
        recipe=job.recipe.record(),
        calibration=None if job.calibration is None else job.calibration.describe(),
        container=job.container.name,
        container_reason=job.container.reason,
        layers=tuple(total.layers),
        kept=kept,
        totals=totals,
        timing=total.timing,
        environment=job.environment() | measured | _peaks(job.device),
        warnings=tuple(total.warnings),
        files=checkpoint.files(),
        windows=tuple(total.windows),
        companions=tuple(checkpoint.companion_names()),
    )


def _products(job: Job, total: PartRecord) -> dict[str, Any]:
    """What multiplies the result on this device, in the dtype that it is loaded in."""
    device, dtype = job.device.type, job.source.dtype
    found: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    try:
        return found | {"rows": product_rows(total.layers, device, dtype)}
    except UsageError as error:  # a kernel that is forced and does not serve it: no reason to lose the result
        return found | {"rows": [], "problem": str(error)}


def _describe_model(job: Job, parameters: int) -> dict[str, Any]:
    model = job.source.skeleton
    description = {
        "source": job.source.name,
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "parameters": parameters,
        "dtype": str(job.source.dtype).removeprefix("torch."),
        "fingerprint": job.fingerprint,
    }
    quantization = job.source.quantization
    return description if quantization is None else description | {"quantization": quantization.to_dict()}


def _peaks(device: torch.device) -> dict[str, int]:
    """Largest memory in use so far: of the process, and of what PyTorch took on the GPU."""
    peaks = {"peak_memory": peak_memory()}
    if device.type == "cuda":
        peaks["peak_device"] = torch.cuda.max_memory_allocated(device)
    return peaks
