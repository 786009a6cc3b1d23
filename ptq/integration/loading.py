"""`load`: a quantized model from its folder, packed in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from calib.model.model_class import find_model_class
from ptq.checkpoint.verify import SKIP_KEY
from ptq.errors import OutputError
from ptq.integration.transformers import register

__all__ = ["load"]


def load(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    verify: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a local folder that ``ptq quantize`` (or transformers) wrote.

    Args:
        folder: has ``config.json`` and the weights; nothing is downloaded.
        dtype: dtype of activations and of what was not quantized; ``"auto"`` is the source model's. Scales keep theirs.
        device_map: as in ``from_pretrained``, e.g. ``"auto"`` or ``"cuda"``.
        verify: compare the weight files with the hashes in the report first; a folder without one is loaded as it is.
        kwargs: passed on to ``from_pretrained`` of the class: the causal language model of the config, or for a
            multimodal checkpoint the class that its config names.

    Raises:
        OutputError: ``folder`` is not a folder or has no ``config.json``; with ``verify``, a weight file or the report
            was changed.
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
    kwargs.setdefault("use_safetensors", True)  # never a pickle
    trust = kwargs.get("trust_remote_code")
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(
        path, trust_remote_code=trust, local_files_only=kwargs["local_files_only"]
    )
    found: Any = find_model_class(config, trust_remote_code=bool(trust)) or AutoModelForCausalLM
    if not verify:
        setattr(config, SKIP_KEY, True)  # the quantizer sees nothing else of the call (`verify_checkpoint`)
    model: PreTrainedModel = found.from_pretrained(path, config=config, dtype=dtype, device_map=device_map, **kwargs)
    return model
