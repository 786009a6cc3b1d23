"""`load`: a quantized model from its folder, packed in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptq.errors import OutputError
from ptq.integration.transformers import register

__all__ = ["load"]


def load(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a local folder that ``ptq quantize`` (or transformers) wrote.

    Args:
        folder: has ``config.json`` and the weights; nothing is downloaded.
        dtype: dtype of activations and of what was not quantized; ``"auto"`` is the source model's. Scales keep theirs.
        device_map: as in ``from_pretrained``, e.g. ``"auto"`` or ``"cuda"``.
        kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        OutputError: ``folder`` is not a folder or has no ``config.json``.
    """
    path = Path(folder)
    if not path.is_dir():
        raise OutputError(f"{path} is not a folder: give the output folder of ptq quantize.")
    if not (path / "config.json").is_file():
        raise OutputError(
            f"{path} has no config.json: the quantization was not finished there, or it is another folder."
        )
    register()
    kwargs.setdefault("local_files_only", True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map, **kwargs)
    return model
