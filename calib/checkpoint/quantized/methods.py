"""Which quantization a config names, and what to do with those that are not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calib.errors import ModelError

__all__ = ["METHODS", "OWN_METHOD", "read_dense", "source_method"]

METHODS = ("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors", "gptq", "awq")
OWN_METHOD = "ptq"

_LOAD = "AutoModelForCausalLM.from_pretrained(MODEL"
_SAVE = ".save_pretrained(NEW) of transformers writes it in full precision"
_ADVICE = {
    "bitsandbytes": f"{_LOAD}).dequantize(){_SAVE}, where bitsandbytes is installed",
    "hqq": "hqq keeps no way back to a plain model, so give the full-precision model",
    "mxfp4": f"{_LOAD}, quantization_config=Mxfp4Config(dequantize=True)){_SAVE}",
    "torchao": f"{_LOAD}).dequantize(){_SAVE}, where torchao is installed",
}
_ELSE = "give the full-precision model that it was made from"


def source_method(folder: str, config: Mapping[str, Any]) -> str:
    """The ``quant_method`` of a ``quantization_config``, one of `METHODS`.

    Args:
        folder: for messages.
        config: the ``quantization_config`` as plain data.

    Raises:
        ModelError: another method (named, with what to do), or an output of ptq in its own format.
    """
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"  # its configs had no name at first
    if method == OWN_METHOD:
        raise ModelError(
            f"{folder} is an output of ptq in its native format. It is not quantized again: give the model that it was "
            f"made from (ptq report {folder} names it)."
        )
    algorithm = str(config.get("quant_algo", "")).upper()
    if method not in METHODS or (method == "modelopt" and algorithm != "FP8"):
        named = f"{method} {algorithm}".strip() if method == "modelopt" else method
        raise ModelError(
            f"{folder} is quantized already ({named}), and ptq reads {', '.join(METHODS)} (modelopt: FP8 only): "
            f"{_ADVICE.get(str(method), _ELSE)}."
        )
    return str(method)


def read_dense(config: Mapping[str, Any]) -> bool:
    """Whether a model of this ``quantization_config`` is dequantized to be run, too: transformers would need packages
    or kernels for it. That of compressed-tensors it runs as it is."""
    return config.get("quant_method") in METHODS and config.get("quant_method") != "compressed-tensors"
