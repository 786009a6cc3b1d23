"""The compressed-tensors container: what stock transformers and vLLM load without us.

Integers are its storage ``pack-quantized``; floating-point formats and rounded inputs are in
`ptq.containers.float_schemes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor, nn

from calib.checkpoint.reader import unmerged_experts
from calib.model.experts import expert_linears
from calib.model.structure import find_blocks, fused_experts
from ptq.containers.base import Container
from ptq.containers.float_schemes import find_pair, preset_scheme, renamed, stored_names
from ptq.quantized import QuantizedWeight
from ptq.scheme import SCALE_DTYPES, KeyValueScheme, Scheme

__all__ = ["COMPRESSED_TENSORS", "FORMAT", "QUANT_METHOD", "CompressedTensorsContainer"]

QUANT_METHOD = "compressed-tensors"
FORMAT = "pack-quantized"


class CompressedTensorsContainer(Container):
    """The storages of the compressed-tensors library."""

    name = "compressed-tensors"
    quant_method = QUANT_METHOD

    def unsupported_reason(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        model: nn.Module,
        key_values: KeyValueScheme | None,
    ) -> str | None:
        return (
            _key_values(key_values)
            or _fused_experts(model)
            or _linear_problem(schemes, linears)
            or _split_experts(schemes, model)
        )

    def layer_tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that store linear ``name``, by full name, on the CPU; under the library's names."""
        return renamed(weight.tensors(name), stored_names(weight.scheme.format))

    def read_layer(
        self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedWeight:
        """See `Container.read_layer`."""
        ours = {theirs: mine for mine, theirs in stored_names(scheme.format).items()}
        own = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        return super().read_layer(name, renamed(own, ours), scheme, shape)

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        *,
        key_values: KeyValueScheme | None = None,
        others: Iterable[str] = (),
    ) -> dict[str, Any]:
        """See `Container.quantization_config`; made and validated by the library's own classes."""
        by_scheme: dict[Scheme, list[str]] = {}  # the scales' dtype is the tensor's own affair
        for name, scheme in schemes.items():
            if scheme is not None:
                by_scheme.setdefault(dataclasses.replace(scheme, scale_dtype="auto"), []).append(name)
        dense = [
            name for name, linear in linears.items() if schemes.get(name) is None and isinstance(linear, nn.Linear)
        ]
        groups = {
            f"group_{i}": _group(scheme, ["Linear"] if len(by_scheme) == 1 else names)
            for i, (scheme, names) in enumerate(by_scheme.items())
        }
        storages = {FORMAT if group.format is None else str(group.format) for group in groups.values()}
        storage = storages.pop() if len(storages) == 1 else "mixed-precision"
        config = QuantizationConfig(
            config_groups=groups, format=storage, quantization_status="compressed", ignore=sorted({*dense, *others})
        )
        return {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}


def _linear_problem(schemes: Mapping[str, Scheme | None], linears: Mapping[str, nn.Module]) -> str | None:
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
        pair = find_pair(scheme)
        if scheme.format != "int" and pair is None:
            return f"{name} is {scheme.describe()}, which is written natively only"
        if scheme.rounds_input and pair is None:
            kind = f"{scheme.act_bits} bits" if scheme.act_format is None else scheme.act_format
            return f"the input of {name} is rounded to {kind} at run time, which only ptq does"
        if scheme.input_rotation is not None:
            return f"the input of {name} is rotated at run time, which transformers does not do"
        linear = linears[name]
        if not scheme.symmetric:
            return f"{name} is asymmetric, and transformers (5.23) cannot load packed zero points"
        if not isinstance(linear, nn.Linear):
            return f"{name} is a {type(linear).__name__}, and compressed-tensors quantizes only torch.nn.Linear"
        scale_dtype = scheme.resolved(linear.weight.dtype).scale_dtype
        if pair is not None and scheme.format != "int8" and linear.weight.dtype != torch.bfloat16:
            return f"{name} is {linear.weight.dtype}, and stock loaders unpack {scheme.format} to bfloat16"
        if linear.weight.dtype not in (SCALE_DTYPES[scale_dtype], torch.float32):
            model_dtype = str(linear.weight.dtype).removeprefix("torch.")
            return f"{name} has {scale_dtype} scales, which stock loaders would round to the model's {model_dtype}"
        if pair is None and scheme.group_size is not None and linear.in_features % scheme.group_size:
            return (
                f"{name} has {linear.in_features} input channels, not a multiple of the group size {scheme.group_size}"
            )
    return None


def _key_values(scheme: KeyValueScheme | None) -> str | None:
    return (
        None
        if scheme is None
        else f"keys and values are rounded to {scheme.bits} bits at run time, which only ptq does"
    )


def _fused_experts(model: nn.Module) -> str | None:
    """Stock transformers (5.23) runs the format's decompression on experts as well, and fails where they are dense."""
    names = fused_experts(model)
    blocks = tuple(f"{block}." for block in find_blocks(model)) if names else ()
    for name in names:
        if name.startswith(blocks):  # a vision tower has tensors of three dimensions, too
            return f"{name} holds experts in full precision, which transformers cannot load beside packed weights"
    return None


def _split_experts(schemes: Mapping[str, Scheme | None], model: nn.Module) -> str | None:
    """Why stock transformers (5.23), which decompresses experts while it merges them, would not load these."""
    used = {scheme for scheme in schemes.values() if scheme is not None}
    for name, linear in expert_linears(model).items():
        scheme = schemes.get(name)
        if scheme is None:
            return f"{name} is in full precision, and transformers cannot load that beside packed experts"
        if len(used) > 1:
            return f"{name} is packed in one of {len(used)} schemes, and transformers knows one for all experts"
        dtype = linear.get_parameter("weight").dtype
        if dtype != SCALE_DTYPES[scheme.resolved(dtype).scale_dtype]:
            return f"{name} would get the dtype of its scales, {scheme.scale_dtype}, in transformers"
    stray = unmerged_experts(model)
    return None if stray is None else f"{stray} is a name under which transformers does not look for experts"


def _group(scheme: Scheme, targets: list[str]) -> QuantizationScheme:
    pair = find_pair(scheme)
    if pair is not None:
        return preset_scheme(pair, targets)
    arguments = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
        dynamic=False,
    )
    return QuantizationScheme(targets=targets, weights=arguments)


COMPRESSED_TENSORS = CompressedTensorsContainer()
