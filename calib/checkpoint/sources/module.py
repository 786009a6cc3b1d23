"""`ModuleSource`: a model in memory, copied block by block."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from calib.checkpoint.files import CompanionRule
from calib.checkpoint.quantized import SourceQuantization
from calib.checkpoint.safetensors_header import StoredTensor
from calib.checkpoint.sources.skeleton import SAMPLE_BYTES, expert_sizes, release_parameters
from calib.errors import ModelError
from calib.model.expert_tensors import ExpertTensors
from calib.model.experts import split_experts

__all__ = ["ModuleSource"]


class ModuleSource:
    """A model in memory; see `ModelSource`. Blocks are copied, the model itself stays as it is."""

    folder: Path | None = None
    companions = CompanionRule()
    quantization: SourceQuantization | None = None

    def __init__(self, model: nn.Module, name: str) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings") or config.is_encoder_decoder:
            raise ModelError(f"{type(model).__name__} is not a causal language model of transformers.")
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"{name} is quantized already; give the full-precision model.")
        self._model: Any = model
        self.config_changes: Mapping[str, Any] = {}
        self.name = name
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        with init_empty_weights(include_buffers=False):
            skeleton: Any = type(self._model)(copy.deepcopy(config))
        self.skeleton: PreTrainedModel = skeleton.to(self.dtype).eval()
        self.skeleton.tie_weights()
        split_experts(self.skeleton)
        self._experts = ExpertTensors(self.skeleton)

    def model_key(self, key: str) -> str:
        return key

    def load(self, names: frozenset[str]) -> None:
        self.fill(names)
        self.skeleton.tie_weights()

    def fill(self, names: frozenset[str]) -> None:
        """`load` without tying weights."""
        state = self._state()
        values = {
            name: view.detach().to("cpu", copy=True)
            for fused in self._experts.fused(names)
            for name, view in self._experts.parts(fused, state[fused], names)
        }
        self.skeleton.load_state_dict(values, assign=True, strict=False)

    def release(self, names: frozenset[str]) -> None:
        release_parameters(self.skeleton, names, self.dtype)

    def raw_tensors(self, names: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
        fused, torn = self._experts.fused(names), self._experts.torn(names)
        for key, value in self._state().items():
            if key in torn:
                for name, view in self._experts.parts(key, value.detach(), names):
                    yield name, name, view.cpu().clone(memory_format=torch.contiguous_format)
            elif key in fused:
                yield key, min(self._experts.split(frozenset({key}))), value.detach().cpu()

    def unused(self) -> list[str]:
        return []

    def carried(self) -> dict[str, StoredTensor]:
        return {}

    def stored_config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self.skeleton.config.to_json_string())
        return config

    def stored_sizes(self, names: frozenset[str]) -> Iterator[tuple[str, tuple[int, ...], int]]:
        fused, torn = self._experts.fused(names), self._experts.torn(names)
        for key, value in self._state().items():
            if key in fused and key not in torn:
                yield min(self._experts.split(frozenset({key}))), tuple(value.shape), value.nbytes
        yield from expert_sizes(self.skeleton, self._experts.split(torn) & names)

    def _state(self) -> Mapping[str, Tensor]:
        """The state without tensors that are another name of one before (tied weights)."""
        tied = set(getattr(self._model, "all_tied_weights_keys", {}) or {})
        state: dict[str, Tensor] = self._model.state_dict()
        return {name: value for name, value in state.items() if name not in tied}

    def tensor_names(self) -> frozenset[str]:
        return self._experts.split(frozenset(self._state()))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._model.config.to_dict(), sort_keys=True, default=str).encode())
        for name, value in self._state().items():
            flat = value.detach().flatten()
            step = max(1, flat.numel() // SAMPLE_BYTES)
            digest.update(f"{name} {tuple(value.shape)} {flat.double().sum().item()!r}".encode())
            digest.update(flat[::step].double().cpu().numpy().tobytes())
        return digest.hexdigest()
