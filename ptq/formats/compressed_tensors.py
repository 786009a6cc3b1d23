"""The compressed-tensors format ``pack-quantized``: what stock transformers and vLLM load without us."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import nn

from ptq.packing.integer import layer_tensors
from ptq.scheme import SCALE_DTYPES, Scheme

__all__ = ["FORMAT", "QUANT_METHOD", "layer_tensors", "quantization_config", "unsupported_reason"]

QUANT_METHOD = "compressed-tensors"
FORMAT = "pack-quantized"


def unsupported_reason(schemes: Mapping[str, Scheme | None], linears: Mapping[str, nn.Module]) -> str | None:
    """The reason why stock loaders could not carry the result in this format; ``None`` if they give the same weights.

    Stock loaders cast scales to the model's dtype: fp16 scales in a bfloat16 model come out rounded to 8 bits, which is
    another model (weights off by up to 0.3 %). Scales in the model's own dtype are exact.

    Args:
        schemes: the scheme of every linear by full name, ``None`` for full precision.
        linears: the modules by the same names, in the dtype that ``config.json`` will name (the meta device is fine).
    """
    for name, scheme in schemes.items():
        if scheme is None:
            continue
        if scheme.act_bits is not None:
            return f"the input of {name} is rounded to {scheme.act_bits} bits at run time, which only ptq does"
        if scheme.input_rotation is not None:
            return f"the input of {name} is rotated at run time, which only ptq does"
        linear = linears[name]
        if not scheme.symmetric:
            return f"{name} is asymmetric, and transformers cannot load packed zero points"
        if not isinstance(linear, nn.Linear):
            return f"{name} is a {type(linear).__name__}, and compressed-tensors quantizes only torch.nn.Linear"
        scale_dtype = scheme.resolved(linear.weight.dtype).scale_dtype
        if linear.weight.dtype not in (SCALE_DTYPES[scale_dtype], torch.float32):
            model_dtype = str(linear.weight.dtype).removeprefix("torch.")
            return f"{name} has {scale_dtype} scales, which stock loaders would round to the model's {model_dtype}"
        if scheme.group_size is not None and linear.in_features % scheme.group_size:
            return (
                f"{name} has {linear.in_features} input channels, not a multiple of the group size {scheme.group_size}"
            )
    return None


def quantization_config(
    schemes: Mapping[str, Scheme | None], linears: Mapping[str, nn.Module], others: Iterable[str] = ()
) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``, made and validated by the library's own classes.

    Args:
        schemes: the scheme of every linear by full name, ``None`` (or no entry) for full precision.
        linears: every linear of the model by full name, the head included: those without a scheme are listed under
            ``ignore``.
        others: names of more modules in full precision, which the model as we build it does not have.
    """
    by_scheme: dict[tuple[int, bool, int | None], list[str]] = {}  # the scales' dtype is the tensor's own affair
    for name, scheme in schemes.items():
        if scheme is not None:
            by_scheme.setdefault((scheme.bits, scheme.symmetric, scheme.group_size), []).append(name)
    dense = [name for name, linear in linears.items() if schemes.get(name) is None and isinstance(linear, nn.Linear)]
    groups = {
        f"group_{i}": QuantizationScheme(
            targets=["Linear"] if len(by_scheme) == 1 else names, weights=_weight_args(*key)
        )
        for i, (key, names) in enumerate(by_scheme.items())
    }
    config = QuantizationConfig(
        config_groups=groups, format=FORMAT, quantization_status="compressed", ignore=sorted({*dense, *others})
    )
    return {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}


def _weight_args(bits: int, symmetric: bool, group_size: int | None) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        dynamic=False,
    )
