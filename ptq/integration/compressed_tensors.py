"""The stock compressed-tensors quantizer of transformers, except that packed weights stay packed.

The stock one decompresses the whole model at the first forward. Ours takes over where every quantized module is a
linear whose weights are packed integers, or whose weights and inputs are a pair of `ptq.containers.float_schemes`, and
nothing else is quantized (no key-value cache); anything else is left to the stock code.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_named_modules, match_targets
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from calib.model.experts import join_experts
from ptq.checkpoint.verify import verify_checkpoint
from ptq.containers.compressed_tensors import FORMAT
from ptq.containers.float_schemes import PAIRS, preset_scheme, stored_names
from ptq.containers.native import GUARD_KEY
from ptq.containers.vllm_tensors import stored_rotations
from ptq.integration.experts import leave_split_experts, split_named_experts
from ptq.integration.rotated_config import install_rotations
from ptq.integration.stored_names import StoredNames
from ptq.integration.swap import share_inputs, swap_linear
from ptq.scheme import MAX_BITS, MIN_BITS, Scheme

__all__ = ["PackedCompressedTensorsQuantizer", "is_scale"]

_PACKED, _WEIGHT, _SCALE = ".weight_packed", ".weight", ".weight_scale"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class PackedCompressedTensorsQuantizer(CompressedTensorsHfQuantizer):
    """Swaps linears for `QuantLinear` where it can carry them, and is the stock quantizer otherwise."""

    packed = False
    """Whether this model was taken over; known once its skeleton has been built."""
    _stored_packed: Sequence[str] = ()
    _renamed: Mapping[str, Mapping[str, str]] = MappingProxyType({})

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        # See `PtqQuantizer.update_attn_implementation`: the sentence is not for us.
        if hasattr(config, GUARD_KEY):
            delattr(config, GUARD_KEY)
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        verify_checkpoint(model.config, kwargs.get("checkpoint_files"))
        schemes = None
        if not self._wants_stock():
            self._stored_packed = packed_linears(kwargs.get("checkpoint_files"))
            split_named_experts(model, self._stored_packed)
            schemes = packed_schemes(model, self.compressor.quantization_config)
        rotations = stored_rotations(getattr(self.quantization_config, "stored_transforms", {}), model)
        if schemes is None:
            join_experts(model)
            super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[no-untyped-call]
            install_rotations(model, rotations)
            return
        self.packed = True
        install_rotations(model, {name: one for name, one in rotations.items() if name not in schemes})
        schemes = {
            name: dataclasses.replace(scheme, input_rotation=rotations.get(name)) for name, scheme in schemes.items()
        }
        self._renamed = {name: stored_names(scheme.format) for name, scheme in schemes.items()}
        for name, scheme in schemes.items():
            swap_linear(model, name, scheme, guard=False)
        share_inputs(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        # Experts that stay fused are still decompressed by the stock conversions, which find nothing where what they
        # merge is stored in full precision: those stay what they are without a quantizer.
        stock = super().update_weight_conversions
        general: list[Any] = stock([], model)  # type: ignore[no-untyped-call]
        conversions: list[Any] = []
        for conversion in weight_conversions:
            if self.packed and _merges_dense(conversion, weight_conversions, self._stored_packed):
                conversions.append(conversion)
            else:
                updated = stock([conversion], model)  # type: ignore[no-untyped-call]
                conversions += updated[: len(updated) - len(general)]
        if any(self._renamed.values()):  # after the model's own renamings, whose results are the model's names
            conversions.append(StoredNames.of(self._renamed, model.base_model_prefix))
        return leave_split_experts(conversions + general, model)

    def _wants_stock(self) -> bool:
        config = self.quantization_config
        return bool(config.dequantize or not config.is_quantization_compressed or self.use_fp8_kernel)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        if self.packed and is_scale(converter):
            return None
        return super().get_new_dtype(converter, param, dtype)

    @property
    def is_trainable(self) -> bool:
        """True for packed layers: adapters on them can be trained (gradients flow through them)."""
        return self.packed or bool(super().is_trainable)

    @property
    def is_qat_trainable(self) -> bool:  # type: ignore[override]  # a method in the stock class, so that it reads as true
        return not self.packed and bool(super().is_qat_trainable())

    @property
    def is_compileable(self) -> bool:
        """True for packed layers, as in the native format."""
        return self.packed or bool(super().is_compileable)


def packed_linears(files: Iterable[str] | None) -> list[str]:
    """Names of the modules that these safetensors files hold packed weights of."""
    found = []
    for file in files or ():
        with safe_open(file, framework="pt") as handle:
            keys = set(handle.keys())
        found += [key.removesuffix(_PACKED) for key in keys if key.endswith(_PACKED)]
        scaled = (key.removesuffix(_SCALE) for key in keys if key.endswith(_SCALE))
        found += [name for name in scaled if f"{name}{_WEIGHT}" in keys]
    return sorted(found)


def _merges_dense(conversion: Any, conversions: Iterable[Any], packed: Iterable[str]) -> bool:
    """Whether a step of loading merges or splits weights, and none of those is stored packed.

    Args:
        conversion: the step.
        conversions: all steps of the model: its renamings come before it.
        packed: names of the modules that are stored packed.
    """
    if not isinstance(conversion, WeightConverter):
        return False
    renamings = [copy.copy(one) for one in conversions if isinstance(one, WeightRenaming)]  # asking leaves a mark
    probe = [copy.copy(conversion)]
    weights = {f"{_NUMBER.sub('0', name)}.weight" for name in packed}  # one of all blocks and experts
    return all(rename_source_key(weight, renamings, probe)[1] is None for weight in weights)


def is_scale(converter: Any) -> bool:
    """Whether a loading step of transformers is for stored scales: these keep their dtype whatever ``dtype=`` asks."""
    return any(pattern.endswith("_scale") for pattern in converter.target_patterns)


def packed_schemes(model: nn.Module, config: QuantizationConfig | None) -> dict[str, Scheme] | None:
    """The scheme of every linear that the config quantizes; ``None`` if any of it is beyond `QuantLinear`."""
    if config is None or config.kv_cache_scheme is not None:
        return None
    targets = {target: group for group in config.config_groups.values() for target in group.targets}
    schemes: dict[str, Scheme] = {}
    for name, module in match_named_modules(model, targets, config.ignore):
        scheme = _scheme(targets[match_targets(name, module, targets)[0]], config.format)
        if scheme is None or not isinstance(module, nn.Linear):
            return None
        schemes[name] = scheme
    return schemes or None


def _decisive(args: QuantizationArgs | None) -> dict[str, Any] | None:
    """The fields that decide what stored tensors mean; a default written to JSON may come back as another one."""
    return None if args is None else args.model_dump(exclude={"zp_dtype", "observer", "observer_kwargs"})


def _scheme(group: QuantizationScheme, default_format: str) -> Scheme | None:
    """Our name for a group's scheme, ``None`` if it is neither plain packed integers nor a pair of formats."""
    args = group.weights
    for pair, (_, storage) in PAIRS.items():
        wanted = preset_scheme(pair, group.targets)
        if storage != (group.format or default_format):
            continue
        if (_decisive(wanted.weights), _decisive(wanted.input_activations)) == (
            _decisive(args),
            _decisive(group.input_activations),
        ):
            return Scheme.of(pair[0], act_format=pair[1])
    if args is None or group.input_activations is not None or group.output_activations is not None:
        return None
    plain = args.type == "int" and not args.dynamic and args.strategy in ("group", "channel")
    if not plain or (group.format or default_format) != FORMAT or not MIN_BITS <= args.num_bits <= MAX_BITS:
        return None
    return Scheme(args.num_bits, args.symmetric, args.group_size if args.strategy == "group" else None)
