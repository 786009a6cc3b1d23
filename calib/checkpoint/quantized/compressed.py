"""Checkpoints of compressed-tensors, decompressed weight by weight by that library (layout: docs/formats.md)."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_targets
from pydantic import ValidationError
from torch import Tensor, nn

from calib.checkpoint.json import quoted
from calib.checkpoint.quantized.packed import PackedWeight, find, require_shape
from calib.checkpoint.safetensors_header import StoredTensor
from calib.errors import ModelError

__all__ = ["compressed_weights"]

_FP4 = {"nvfp4-pack-quantized": "tensor_group", "mxfp4-pack-quantized": "group"}
"""Formats with two codes of 4 bits per byte, and the strategy of their scales."""
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized", *_FP4)
_SCALE = ".weight_scale"
_WIDENED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FULL = "Give the full-precision model."


def compressed_weights(
    folder: str, stored: Mapping[str, StoredTensor], config: Mapping[str, Any], read: Callable[[str], Tensor]
) -> list[PackedWeight]:
    """All weights of a checkpoint of compressed-tensors.

    Args:
        folder: for messages.
        stored: the tensors in the files.
        config: the ``quantization_config``.
        read: a tensor of the files by its name (only stored shapes are read).

    Raises:
        ModelError: a format that is not among `_FORMATS`, sparsity, rotations; tensors that are missing or do not fit.
    """
    for key in ("sparsity_config", "transform_config"):
        given = config.get(key) or {}
        if not isinstance(given, dict):
            raise ModelError(f"{folder} has a quantization_config whose {key} is {quoted(given)}, not an object.")
        named = {k: v for k, v in given.items() if v and k != "registry_requires_subclass"}
        if named and named.get("format") != "dense":
            raise ModelError(
                f"{folder} is a compressed-tensors checkpoint with a {key}, which ptq does not read. {_FULL}"
            )
    try:
        known = QuantizationConfig.model_validate(dict(config))
    except (ValidationError, ValueError) as error:
        line = str(error).strip().splitlines()[-1]
        raise ModelError(
            f"{folder}: compressed-tensors does not accept the quantization_config: {line} {_FULL}"
        ) from error
    targets = {target: group for group in known.config_groups.values() for target in group.targets}
    for target in (*targets, *(known.ignore or ())):
        _check_pattern(folder, target)
    found = []
    for name in stored:
        if name.endswith(_SCALE):
            prefix = name.removesuffix(_SCALE)
            found.append(_compressed(prefix, stored, _scheme(prefix, targets), known.format, read))
    return found


def _check_pattern(folder: str, target: str) -> None:
    """Names that begin with ``re:`` are patterns of Python."""
    try:
        re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    except re.error as error:
        raise ModelError(f"{folder}: the quantization_config has the pattern {quoted(target)}: {error}.") from error


def _scheme(prefix: str, targets: Mapping[str, QuantizationScheme]) -> QuantizationScheme:
    matches = match_targets(prefix, nn.Linear(1, 1, device="meta"), targets)
    scheme = targets[matches[0]] if matches else None
    if scheme is None or scheme.weights is None:
        raise ModelError(f"{prefix} is quantized, but no group of the quantization_config names it or all Linear.")
    return scheme


def _compressed(
    prefix: str,
    stored: Mapping[str, StoredTensor],
    scheme: QuantizationScheme,
    default: str,
    read: Callable[[str], Tensor],
) -> PackedWeight:
    layout = str(getattr(scheme.format, "value", scheme.format) or default)
    if layout not in _FORMATS:
        raise ModelError(
            f"{prefix} is stored in the compressed-tensors format {layout!r}; ptq reads {', '.join(_FORMATS)}. {_FULL}"
        )
    packed, args = layout == "pack-quantized", scheme.weights
    if layout in _FP4:
        return _fp4(prefix, layout, stored, scheme)
    roles = ["weight_packed" if packed else "weight", "weight_scale"]
    roles += ["weight_shape"] if packed else []
    roles += [] if args.symmetric else ["weight_zero_point"]
    tensors = {role: find(stored, prefix, role) for role in roles}
    if f"{prefix}.weight_g_idx" in stored:
        raise ModelError(
            f"{prefix} has groups in another order (weight_g_idx), which compressed-tensors gave up. {_FULL}"
        )
    if packed:
        require_shape(f"{prefix}.weight_shape", tensors["weight_shape"], (2,), "the format")
    shape = tuple(read(f"{prefix}.weight_shape").tolist()) if packed else tensors["weight"].shape
    if len(shape) != 2 or min(shape) < 1:
        raise ModelError(f"{prefix} is stored as a weight of the shape {list(shape)}, not two sizes.")
    _check(prefix, tensors, shape, args, packed=packed)
    parts = {role: f"{prefix}.{role}" for role in roles}
    make = functools.partial(_decompress, BaseCompressor.get_value_from_registry(layout), scheme, shape)
    return PackedWeight(f"{prefix}.weight", parts, shape, args.num_bits, make, _type(args))


def _fp4(prefix: str, layout: str, stored: Mapping[str, StoredTensor], scheme: QuantizationScheme) -> PackedWeight:
    """Codes of E2M1: two input channels per byte, with a scale per group, and in NVFP4 one of the whole weight."""
    args = scheme.weights
    group, by_tensor = args.group_size or 0, layout.startswith("nvfp4")
    if args.num_bits != 4 or str(args.strategy) != _FP4[layout] or group < 1:
        raise ModelError(f"{prefix} is {layout} with {args.num_bits} bits and scales by {args.strategy}. {_FULL}")
    packed = find(stored, prefix, "weight_packed")
    if len(packed.shape) != 2 or 0 in packed.shape:
        raise ModelError(f"{prefix}.weight_packed has the shape {list(packed.shape)}, not two sizes.")
    shape = (packed.shape[0], 2 * packed.shape[1])
    why = f"{layout} of a weight of {shape[0]} x {shape[1]}"
    scales = find(stored, prefix, "weight_scale")
    require_shape(f"{prefix}.weight_scale", scales, (shape[0], math.ceil(shape[1] / group)), why)
    roles = ["weight_packed", "weight_scale"]
    if by_tensor:
        require_shape(f"{prefix}.weight_global_scale", find(stored, prefix, "weight_global_scale"), (1,), why)
        roles.append("weight_global_scale")
    make = functools.partial(_decompress, BaseCompressor.get_value_from_registry(layout), scheme, shape)
    parts = {role: f"{prefix}.{role}" for role in roles}
    return PackedWeight(f"{prefix}.weight", parts, shape, 4, make, layout.partition("-")[0])


def _type(args: Any) -> str:
    """A plain number with its scales, for people."""
    kind = f"{'fp' if str(getattr(args.type, 'value', args.type)) == 'float' else 'int'}{args.num_bits}"
    strategy = str(getattr(args.strategy, "value", args.strategy))
    return f"{kind} g{args.group_size}" if strategy == "group" else f"{kind} per {strategy}"


def _check(
    prefix: str, tensors: Mapping[str, StoredTensor], shape: tuple[int, ...], args: Any, *, packed: bool
) -> None:
    """The shapes of the parts, by the strategy of the scales."""
    out, width = shape
    scales: dict[str, tuple[tuple[int, ...], ...]] = {
        "tensor": ((1,), ()),
        "channel": ((out, 1),),
        "group": ((out, math.ceil(width / (args.group_size or width))),),
    }
    if args.block_structure:
        scales["block"] = ((math.ceil(out / args.block_structure[0]), math.ceil(width / args.block_structure[1])),)
    strategy = str(args.strategy)
    why = f"{strategy} scales and {args.num_bits} bits of a weight of {out} x {width}"
    if strategy not in scales:
        raise ModelError(f"{prefix} has scales by {strategy!r}; ptq reads {', '.join(scales)}. {_FULL}")
    scale = tensors["weight_scale"]
    if scale.shape not in scales[strategy]:
        require_shape(f"{prefix}.weight_scale", scale, scales[strategy][0], why)
    if packed:
        # Before 0.18, compressed-tensors padded words of 3, 5, 6 and 7 bits: another width, refused here.
        words = (out, math.ceil(width * args.num_bits / 32))
        require_shape(f"{prefix}.weight_packed", tensors["weight_packed"], words, why)
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        rows = math.ceil(out * args.num_bits / 32) if packed and strategy != "tensor" else None
        wanted = scale.shape if rows is None else (rows, scale.shape[1])
        require_shape(f"{prefix}.weight_zero_point", zeros, wanted, why)


def _decompress(
    compressor: type[BaseCompressor], scheme: QuantizationScheme, shape: tuple[int, ...], parts: Mapping[str, Tensor]
) -> Tensor:
    scale = parts["weight_scale"]
    # The library computes in the dtype of an integer's scale; exponents (uint8) and FP8 scales it takes as they are.
    state = dict(parts) | ({"weight_scale": scale.float()} if scale.dtype in _WIDENED else {})
    weight: Tensor = compressor.decompress(state, scheme)["weight"].float()
    if weight.shape != torch.Size(shape):
        raise ModelError(f"compressed-tensors gave a weight of {list(weight.shape)} where {list(shape)} was stored.")
    return weight
