"""A quantized model of another program, or a ``.gguf`` file, as a dequantized folder: one part in memory at a time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from calib.checkpoint.files import resolve_model
from calib.checkpoint.reader import open_model
from calib.checkpoint.sources.types import ModelSource
from calib.runner.forward import check_weight
from ptq.checkpoint.card import add_card
from ptq.checkpoint.companions import copy_companions, find_companions
from ptq.checkpoint.writer import CheckpointWriter
from ptq.errors import ModelError
from ptq.export.dense import DENSE_DTYPES
from ptq.pipeline.events import Event, Listener
from ptq.pipeline.output.unquantized import outside_parts
from ptq.pipeline.preparation.preflight import check_disk
from ptq.recipe import Recipe
from ptq.report import IMPORTED, KeptTensor, Report

__all__ = ["write_dense_copy"]


def write_dense_copy(model: str, name: str, out: Path, listener: Listener, *, trust_remote_code: bool) -> Report:
    """Write the folder.

    Args:
        model: a folder, a hub id or a ``.gguf`` file.
        name: of the format, a key of `DENSE_DTYPES`.
        out: the new folder.
        listener: called at every step.
        trust_remote_code: run modelling code that ships with the model.

    Raises:
        ModelError: a model that is not read.
        OutputError: the folder cannot be written.
    """
    start, dtype = time.monotonic(), DENSE_DTYPES[name]
    source = open_model(model, trust_remote_code=trust_remote_code)
    parts = outside_parts(source.skeleton, source.tensor_names())
    numbers = sum(parameter.numel() for parameter in source.skeleton.parameters())
    check_disk(out, numbers * dtype.itemsize)
    listener(Event("blocks", text="parts", total=len(parts)))
    with CheckpointWriter(out) as checkpoint:
        for done, (part, names) in enumerate(parts.items(), start=1):
            tensors = {}
            for key, _, tensor in source.raw_tensors(names):
                check_weight(tensor, key)
                tensors[key] = tensor.to(dtype) if tensor.dtype in (source.dtype, dtype) else tensor
            checkpoint.write_part(part, tensors)
            listener(Event("block_done", name=part, done=done, total=len(parts)))
        config = _copy_rest(source, model, checkpoint, trust_remote_code)
        report = _report(source, name, checkpoint, numbers, time.monotonic() - start)
        report, left = add_card(checkpoint, report, source.folder)
        if left is not None:
            listener(Event("message", left))
        checkpoint.finish({**config, "dtype": str(dtype).removeprefix("torch.")}, None, report)
    return report


def _copy_rest(source: ModelSource, model: str, checkpoint: CheckpointWriter, trust: bool) -> dict[str, Any]:
    """Everything beside the weights; gives the config."""
    if source.folder is not None:
        copy_companions(find_companions(resolve_model(model), checkpoint.out, code=trust), checkpoint.companions)
    else:
        path = Path(model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"cannot read the tokenizer of {model}: {error}") from error
        tokenizer.save_pretrained(checkpoint.companions)
        source.skeleton.generation_config.save_pretrained(checkpoint.companions)
    config = source.stored_config()
    architectures = config.get("architectures") or [type(source.skeleton).__name__]
    return {k: v for k, v in config.items() if k != "torch_dtype"} | {"architectures": architectures}


def _report(source: ModelSource, name: str, checkpoint: CheckpointWriter, numbers: int, seconds: float) -> Report:
    known = source.quantization
    return Report(
        model={
            "source": source.name,
            "architecture": type(source.skeleton).__name__,
            "model_type": source.skeleton.config.model_type,
            "parameters": numbers,
            "dtype": str(source.dtype).removeprefix("torch."),
            "fingerprint": None,
            **({} if known is None else {"quantization": known.to_dict()}),
        },
        recipe=Recipe().record() | {"method": IMPORTED},
        calibration=None,
        container=name,
        container_reason=f"dequantized from {source.name}",
        layers=(),
        kept=(KeptTensor("all weights", "dequantized", checkpoint.weight_bytes),),
        totals={
            "quantized_parameters": 0,
            "kept_parameters": numbers,
            "payload_bytes": 0,
            "kept_bytes": checkpoint.weight_bytes,
            "file_bytes": checkpoint.weight_bytes,
            "source_bytes": numbers * source.dtype.itemsize,
            "bits_per_weight": 8.0 * DENSE_DTYPES[name].itemsize,
            "seconds": seconds,
        },
        timing={},
        environment={"versions": {}},
        files=checkpoint.files(),
        companions=tuple(checkpoint.companion_names()),
    )
