"""The tokenizer and the calibration tokens of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calib.checkpoint.config import check_tokenizer_config
from calib.checkpoint.reader import ModelSource
from calib.data.bos import window_bos
from calib.data.tokens import Calibration, load_calibration, sample_from_model
from calib.model.model_class import find_model_class
from ptq.errors import ModelError, PtqError, UsageError
from ptq.pipeline.events import Event, Listener
from ptq.recipe import CalibrationSpec

__all__ = ["draw_calibration", "load_tokenizer", "longest_context"]


def load_tokenizer(source: ModelSource, trust_remote_code: bool, *, required: bool) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; ``None`` for a model in memory or where it is not needed and not there.

    Args:
        source: The model.
        trust_remote_code: Run code that ships with the model.
        required: Raise where there is none.

    Raises:
        ModelError: The tokenizer's files cannot be read.
        UsageError: It is required, and the model is in memory.
    """
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


def longest_context(model: nn.Module) -> int | None:
    """The most tokens that a model takes at once; ``None`` where its config names no limit."""
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def draw_calibration(
    source: ModelSource,
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    listener: Listener,
    trust_remote_code: bool,
) -> Calibration:
    """The calibration tokens of a recipe.

    Args:
        source: The model, which may have to write the text.
        spec: Which text, and how much of it.
        tokenizer: Of the model.
        listener: Is given sentences.
        trust_remote_code: Run code that ships with the model.

    Raises:
        PtqError: The text cannot be read, or is too short.
    """
    context = longest_context(source.skeleton)
    seqlen = spec.fitted(context).tokens_per_sequence
    listener(Event("message", f"calibration: {spec.samples} x {seqlen} tokens of {spec.source}, seed {spec.seed}"))

    def sample(samples: int, length: int, seed: int) -> Tensor:
        whole = _whole_model(source, trust_remote_code)
        # auto: the tokenizer's BOS, else what the model's config names, which is how it writes from nothing
        first = window_bos(tokenizer, spec.bos, "--calib-bos")
        own = spec.bos == "auto" and first is None
        return sample_from_model(whole, samples, length, seed, bos="config" if own else first)

    calibration = load_calibration(
        spec.source,
        tokenizer,
        samples=spec.samples,
        seqlen=seqlen,
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
