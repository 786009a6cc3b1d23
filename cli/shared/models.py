"""MODEL on the command line -> a model ready to run, and its tokenizer. A folder, a ``.gguf`` file or a hub id."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from calib.checkpoint.atomic_files import file_sha256
from calib.checkpoint.config import check_config, check_tokenizer_config
from calib.checkpoint.files import checkpoint_files, resolve_model, stored_tensors
from calib.checkpoint.gguf_model import check_gguf_model
from calib.checkpoint.quantized import read_dense
from calib.checkpoint.reader import open_model
from calib.errors import ModelError, unknown_name
from calib.model.model_class import text_model
from calib.precision import has_fast_bfloat16
from calib.runner.forward import move_to
from evals.evaluate import model_info
from evals.record import ModelInfo
from ptq.api import resolve_device
from ptq.integration.loading import load
from ptq.report import REPORT_NAME, Report

__all__ = [
    "DTYPES",
    "LoadedModel",
    "describe",
    "files_fingerprint",
    "load_model",
    "load_tokenizer",
    "locate",
    "resolved_dtype",
]

_DECISIVE = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.py",
)
# What quantizers of transformers raise besides, on a checkpoint or an installation that they cannot work with.
_OF_OTHERS = (AttributeError, KeyError, RuntimeError, TypeError, re.error)
GGUF_DTYPE = "bfloat16"  # what `calib.checkpoint.reader` dequantizes a .gguf file to
DTYPES = ("auto", "float32", "bfloat16", "float16")


class LoadedModel(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the name that it was asked for by."""

    model: Any
    tokenizer: Any
    source: str


def load_model(
    source: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a causal language model, packed or plain, and the tokenizer beside it.

    Args:
        source: a folder of ``ptq quantize`` or of transformers, a ``.gguf`` file, a hub id. GGUF, FP8, GPTQ and AWQ are
            dequantized on loading.
        device: ``auto`` (the GPU where there is one), ``cpu``, ``cuda`` or ``cuda:i``.
        dtype: of activations and of what is not quantized; ``auto`` is the checkpoint's (bfloat16 for a ``.gguf``
            file), or float32 where the device has no native bfloat16.
        trust_remote_code: allow model code that comes with the model.

    Raises:
        UsageError: an unknown dtype or device.
        ModelError: no such model, no safetensors weights in it, not a causal language model, no tokenizer.
        OutputError: a folder that is damaged.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    where = resolve_device(device)
    dtype = resolved_dtype(dtype, where, source)
    folder, extra = locate(source, trust_remote_code)
    extra |= {"trust_remote_code": trust_remote_code}
    placed: dict[str, Any] = {"dtype": dtype, "device_map": None if where.type == "cpu" else {"": str(where)}}
    read: Any = AutoModelForCausalLM.from_pretrained if "gguf_file" in extra else load
    quantized = "gguf_file" not in extra and bool(stated := _quantization(folder, trust_remote_code))
    if quantized and read_dense(stated):
        read = _load_dense
    expected = (OSError, ValueError, ImportError, *(_OF_OTHERS if quantized else ()))
    with _quiet_unless_terminal(), _errors_only("gguf_file" in extra):
        try:
            model: Any = read(folder, **placed, **extra)
            tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
        except expected as error:
            if "Unrecognized configuration class" in str(error):
                raise ModelError(f"{source} is not a causal language model: ptq evaluates and runs those.") from error
            raise ModelError(f"cannot load {source}: {_first_line(error)}") from error
    return LoadedModel(text_model(model).eval(), tokenizer, source)


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model that is not loaded itself, for rows of messages.

    Raises:
        ModelError: no such model, or no tokenizer in it that can be read.
    """
    folder, extra = locate(source, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **extra)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot read the tokenizer of {source}: {_first_line(error)}") from error


def _quantization(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    return dict(check_config(folder, trust_remote_code=trust_remote_code).get("quantization_config") or {})


def _load_dense(folder: Path, *, dtype: str, device_map: Any, trust_remote_code: bool) -> Any:
    """A model whose weights are quantized in a way for which transformers needs packages or kernels: dequantized."""
    source = open_model(folder, trust_remote_code=trust_remote_code)
    source.load(source.tensor_names())
    model: Any = source.skeleton
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    device = torch.device("cpu" if device_map is None else device_map[""])
    move_to(
        model, device, source.dtype if dtype == "auto" else getattr(torch, dtype)
    )  # rotary frequencies stay float32
    model.tie_weights()
    return model


def describe(loaded: LoadedModel) -> ModelInfo:
    """What a record says of a model: what is seen of it, its files, and the report of ``ptq quantize`` beside them."""
    found = model_info(loaded.model, loaded.source)
    files = _weight_files(loaded.source)
    info = dataclasses.replace(found, bytes=sum(file.stat().st_size for file in files))
    if Path(loaded.source).suffix == ".gguf" or not (files[0].parent / REPORT_NAME).is_file():
        return info
    card = Report.load(files[0].parent)
    totals = card.totals
    return dataclasses.replace(
        info,
        parameters=int(totals["quantized_parameters"] + totals["kept_parameters"]),
        bits_per_weight=totals["bits_per_weight"],
        recipe=dict(card.recipe) | {"model_fingerprint": card.model.get("fingerprint")},
        calibration=card.calibration,
    )


def files_fingerprint(source: str) -> str:
    """sha256 over a model's files: weights, config, tokenizer, code; not over what else lies beside them."""
    weights = _weight_files(source)
    folder = weights[0].parent
    plain = Path(source).suffix == ".gguf"
    beside = [] if plain else sorted(file for pattern in _DECISIVE for file in folder.glob(pattern))
    digest = hashlib.sha256()
    for file in (*beside, *weights):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def resolved_dtype(dtype: str, device: torch.device, source: str) -> str:
    """What ``auto`` means for a model on a device: the checkpoint's type, or float32 where half precision is emulated.

    A ``.gguf`` file names no type for what it holds: bfloat16, as in the folder that ``ptq quantize`` makes of it.
    """
    if dtype != "auto":
        return dtype
    if not has_fast_bfloat16(device):
        return "float32"
    return GGUF_DTYPE if Path(source).suffix == ".gguf" else "auto"


def _weight_files(source: str) -> list[Path]:
    path = Path(source)
    return [path] if path.suffix == ".gguf" else checkpoint_files(resolve_model(source))


def locate(source: str, trust_remote_code: bool = False) -> tuple[Path, dict[str, Any]]:
    """The folder of the weights, checked to hold no pickles only, and what from_pretrained must be told besides."""
    path = Path(source)
    if path.suffix != ".gguf":
        folder = resolve_model(source)
        check_config(folder, trust_remote_code=trust_remote_code, stored=stored_tensors(folder))
        check_tokenizer_config(folder, trust_remote_code=trust_remote_code)
        return folder, {}
    if not path.is_file():
        raise ModelError(f"there is no file {source} (looked in {Path.cwd()}).")
    check_gguf_model(path)
    return path.parent, {"gguf_file": path.name}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _errors_only(gguf: bool) -> Iterator[None]:
    """transformers advises float32 for packed ``.gguf`` weights; here they are dequantized, and the type is ours."""
    level = transformers_logging.get_verbosity()
    if gguf:
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Loading bars are for terminals. Those of transformers have a switch; the one for GGUF files only has stderr."""
    if sys.stderr.isatty():
        yield
        return
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
