"""transformers' side of the native format: ``from_pretrained`` builds packed layers once this module is registered.

`register` writes into transformers' own tables: quantization method ``ptq`` (the native format), and for
``compressed-tensors`` subclasses of the stock config and quantizer that keep weights packed and rotate inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from calib.model.structure import find_blocks
from ptq.checkpoint.verify import verify_checkpoint
from ptq.containers import native
from ptq.containers.compressed_tensors import QUANT_METHOD as COMPRESSED_TENSORS
from ptq.integration.compressed_tensors import PackedCompressedTensorsQuantizer, is_scale
from ptq.integration.experts import leave_split_experts, split_named_experts
from ptq.integration.rotated_config import CompressedTensorsConfig
from ptq.integration.stored_names import StoredNames
from ptq.integration.swap import share_inputs, swap_linear
from ptq.runtime.kv_cache import set_key_values
from ptq.runtime.linear import QuantLinear
from ptq.scheme import KeyValueScheme, Scheme
from ptq.transforms.rotation.online import StreamRotation

__all__ = ["PtqConfig", "PtqQuantizer", "register"]


def register() -> None:
    """Make ``from_pretrained`` read our checkpoints. Calling it again changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[native.QUANT_METHOD] = PtqConfig
    AUTO_QUANTIZER_MAPPING[native.QUANT_METHOD] = PtqQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED_TENSORS] = CompressedTensorsConfig
    AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = PackedCompressedTensorsQuantizer


class PtqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a native checkpoint (see `ptq.containers.native`).

    Raises:
        OutputError: another version, or a config that does not hold together.
    """

    def __init__(
        self,
        version: int | None = None,
        schemes: Mapping[str, Any] | None = None,
        layers: Mapping[str, str] | None = None,
        key_values: Mapping[str, Any] | None = None,
        residual_rotation: Mapping[str, Any] | None = None,
        check: str | None = None,
        quant_method: str = native.QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers takes names of its enum or others
        self.version = version
        self.schemes = dict(schemes or {})
        self.layers = dict(layers or {})
        self.key_values = key_values
        self.residual_rotation = residual_rotation
        self.check = check
        self.layer_schemes()
        self.key_value_scheme()
        self.stream_rotation()

    def layer_schemes(self) -> dict[str, Scheme]:
        """Scheme of every packed linear by its full name in the causal language model."""
        return native.read_schemes(self.to_dict())

    def key_value_scheme(self) -> KeyValueScheme | None:
        """How keys and values are rounded; ``None`` where they are not."""
        return native.read_key_values(self.to_dict())

    def stream_rotation(self) -> StreamRotation | None:
        """How the residual stream is rotated at run time; ``None`` where it is not."""
        return native.read_residual_rotation(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("quant_method", "version", "schemes", "layers")}
        some = {key: getattr(self, key) for key in ("key_values", "residual_rotation", "check")}
        return own | {key: value for key, value in some.items() if value is not None}


class PtqQuantizer(HfQuantizer):
    """Builds `QuantLinear` modules; their buffers have the names of the checkpoint, so loading needs no conversion."""

    requires_calibration = True  # passing a PtqConfig for a plain checkpoint raises: quantize it with ptq first
    quantization_config: PtqConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        # transformers calls this after it has found us and before it looks for weight files: the moment to take away
        # the sentence that stops a transformers without us (see ptq.containers.native).
        if hasattr(config, native.GUARD_KEY):
            delattr(config, native.GUARD_KEY)
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        verify_checkpoint(model.config, kwargs.get("checkpoint_files"))
        schemes = self.quantization_config.layer_schemes()
        prefix = f"{model.base_model_prefix}."
        rotation = self.quantization_config.stream_rotation()
        if not hasattr(model, model.base_model_prefix):  # AutoModel builds only what lies under the prefix
            rotation = None if rotation is None else rotation.inside(prefix)
            inside = {name: scheme for name, scheme in schemes.items() if "." in name}  # and no head
            schemes = {name.removeprefix(prefix): scheme for name, scheme in inside.items()}
        split_named_experts(model, schemes)
        for name, scheme in schemes.items():
            swap_linear(model, name, scheme, guard=True)
        share_inputs(model)
        if rotation is not None:
            rotation.install(model)
        key_values = self.quantization_config.key_value_scheme()
        if key_values is not None:
            for block in find_blocks(model):  # and not the attention of a vision tower
                set_key_values(model.get_submodule(block), key_values)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        conversions = leave_split_experts(weight_conversions, model)
        own = StoredNames.of_modules(_packed_tensors(model), conversions)
        return conversions if own is None else [own, *conversions]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return None if is_scale(converter) else super().get_new_dtype(converter, param, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters on packed layers can be trained (gradients flow through them); see docs/formats.md."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: a step with a static cache compiles into one graph (docs/kernels.md)."""
        return True


def _packed_tensors(model: PreTrainedModel) -> list[str]:
    """Names of the stored tensors of all packed linears."""
    packed = (name for name, module in model.named_modules() if isinstance(module, QuantLinear))
    return [f"{name}.{leaf}" for name in packed for leaf, _ in model.get_submodule(name).named_buffers(recurse=False)]
