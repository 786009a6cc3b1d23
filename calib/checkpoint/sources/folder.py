"""`FolderSource`: a folder of safetensors, loaded through transformers' own key conversions."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D

from calib.checkpoint.files import CompanionRule
from calib.checkpoint.quantized import StoredWeights
from calib.checkpoint.safetensors_header import StoredTensor
from calib.checkpoint.sources.skeleton import SAMPLE_BYTES, expert_sizes, quiet_transformers, release_parameters
from calib.checkpoint.sources.text_part import text_parameters
from calib.errors import ModelError
from calib.model.expert_tensors import ExpertTensors
from calib.model.experts import split_experts
from calib.model.model_class import find_model_class, is_multimodal

__all__ = ["FolderSource", "build_skeleton"]

_PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")


def build_skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model of a config: an auto class asks the config which class it is, any other one is it."""
    found: Any = find_model_class(config, trust_remote_code=trust_remote_code)
    if issubclass(found, PreTrainedModel):
        return found._from_config(config, dtype=dtype)
    return found.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


class FolderSource:
    """A folder of safetensors; see `ModelSource`."""

    def __init__(
        self,
        folder: Path,
        name: str,
        config: Any,
        trust_remote_code: bool,
        stored: StoredWeights,
        text_only: bool = False,
    ) -> None:
        self.folder: Path = folder
        self.config_changes: Mapping[str, Any] = {}
        self.companions = CompanionRule(code=trust_remote_code)
        self.name = name
        self._stored, self.quantization = stored, stored.quantization
        dtype = getattr(config, "dtype", None) or self._stored_dtype()
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        try:
            with init_empty_weights(include_buffers=False):
                model = build_skeleton(config, self.dtype, trust_remote_code)
        except Exception as error:  # whatever modelling code raises on a config that does not fit together
            raise ModelError(f"cannot build the model that {folder / 'config.json'} describes: {error!r}") from error
        self.skeleton: PreTrainedModel = model.eval()
        self._whole = is_multimodal(model)
        self._conversions: list[Any] = get_model_conversion_mapping(self.skeleton)
        known = dict(self.skeleton.state_dict())
        self._targets = {key: self._parameters_of(key, known) for key in self._stored}
        self._rename_tied(known)
        self._check_complete(text_only)
        self._check_dtypes()
        split_experts(self.skeleton)
        self._experts = ExpertTensors(self.skeleton)
        self._names = self._experts.split(frozenset().union(*self._targets.values()))

    def _stored_dtype(self) -> torch.dtype:
        for tensor in self._stored.values():
            if tensor.dtype in ("BF16", "F16", "F32"):
                return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[tensor.dtype]
        return torch.float32

    def _parameters_of(self, key: str, known: dict[str, Tensor]) -> frozenset[str]:
        """The model's parameters that a checkpoint tensor becomes (several where a tensor is split on loading)."""
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        prefix = self.skeleton.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if pattern is None:
            if self._stored.is_packed(key) and self._is_conv1d(name.rpartition(".")[0]):
                self._stored.transpose(key)
            stored, wanted = self._stored[key], known.get(name)
            if wanted is not None and stored.shape != tuple(wanted.shape):
                raise ModelError(
                    f"{key} has shape {stored.shape} in {stored.file}, the model wants {tuple(wanted.shape)}. Do "
                    "config and weights belong together?"
                )
            return frozenset({name} & known.keys())
        converter = next(c for c in converters if pattern in c.source_patterns)
        first = converter.target_patterns[0]
        return frozenset({name.replace(first, target) for target in converter.target_patterns} & known.keys())

    def _is_conv1d(self, name: str) -> bool:
        return isinstance(dict(self.skeleton.named_modules()).get(name), Conv1D)

    def _rename_tied(self, known: dict[str, Tensor]) -> None:
        """Show a tied weight under the name that the others are tied to, where only another of its names is stored."""
        present = frozenset().union(*self._targets.values())
        for tied, origin in (getattr(self.skeleton, "all_tied_weights_keys", {}) or {}).items():
            key = next((key for key, targets in self._targets.items() if targets == {tied}), None)
            if key is None or origin in present or known[origin].shape != known[tied].shape:
                continue
            self._stored.rename(key, origin)
            del self._targets[key]
            self._targets[origin] = self._parameters_of(origin, known)
            present |= {origin}

    def _check_complete(self, text_only: bool) -> None:
        present = frozenset().union(*self._targets.values())
        tied = set(getattr(self.skeleton, "all_tied_weights_keys", {}) or {})
        missing = sorted({name for name, _ in self.skeleton.named_parameters()} - present - tied)
        text = text_parameters(self.skeleton) if missing and self._whole else frozenset(missing)
        if text_only:
            missing = [name for name in missing if name in text]
        if missing:
            hint = "" if text & set(missing) else " The text part is whole: --text-only writes it alone."
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ModelError(
                f"{self.folder} lacks {len(missing)} of the model's tensors ({shown}). Is the download complete, is "
                f"{type(self.skeleton).__name__} the right class?{hint}"
            )

    def _check_dtypes(self) -> None:
        """Refuse weights that are stored as integers or in eight bits: their scales lie elsewhere, if anywhere."""
        weights = {name for name, parameter in self.skeleton.named_parameters() if parameter.ndim >= 2}
        for key, targets in self._targets.items():
            if targets & weights and self._stored[key].dtype not in _PLAIN_DTYPES:
                raise ModelError(
                    f"{key} is stored as {self._stored[key].dtype}: the model is quantized already, or is no model of "
                    f"weights in full precision."
                )

    def stored_config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if not self.companions.code:  # the files that it names do not go along
            config.pop("auto_map", None)
        return config

    def unused(self) -> list[str]:
        """Tensors of the checkpoint that the model does not have, and that do not go along."""
        return sorted(set(self._strangers()) - self.carried().keys())

    def carried(self) -> dict[str, StoredTensor]:
        strangers = self._strangers() if self._whole else []
        return {key: self._stored[key] for key in strangers if not self._stored.is_quantized_part(key)}

    def _strangers(self) -> list[str]:
        return sorted(key for key, targets in self._targets.items() if not targets)

    def tensor_names(self) -> frozenset[str]:
        return self._names

    def model_key(self, key: str) -> str:
        """The name of a checkpoint tensor after transformers' renamings, before any tensors are joined or split."""
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        known = dict(self.skeleton.state_dict())
        name, _ = rename_source_key(key, renamings, [], self.skeleton.base_model_prefix, known)
        return key if name not in known and key in known else name

    def load(self, names: frozenset[str]) -> None:
        self.fill(names)
        self.skeleton.tie_weights()

    def fill(self, names: frozenset[str]) -> None:
        """`load` without tying weights."""
        self._convert(self._experts.fused(names))
        for fused, tensor in self._experts.take():
            self._experts.fill(fused, tensor, names)

    def _convert(self, fused: frozenset[str]) -> None:
        """Fill parameters of the model as transformers builds it, by their names in that model."""
        keys = [key for key, targets in self._targets.items() if targets & fused]
        with self._stored.slices(keys) as slices, quiet_transformers(), self._experts.fused_in_place():
            config = LoadStateDictConfig(dtype=self.dtype, weight_mapping=copy.deepcopy(self._conversions))
            info, _ = convert_and_load_state_dict_in_model(self.skeleton, slices, config)
        problems = [*info.error_msgs, *info.conversion_errors.values()]
        problems += [f"{name} has shape {tuple(a)}, the model wants {tuple(b)}" for name, a, b in info.mismatched_keys]
        if problems:
            raise ModelError(f"cannot load from {self.folder}: {'; '.join(problems)}")

    def release(self, names: frozenset[str]) -> None:
        release_parameters(self.skeleton, names, self.dtype)

    def raw_tensors(self, names: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
        fused, torn = self._experts.fused(names), self._experts.torn(names)
        for key, targets in self._targets.items():
            if not targets & fused or targets <= torn:
                continue
            if not targets <= fused - torn:
                raise ModelError(f"the tensor {key} holds linears that are quantized and some that are not.")
            yield key, min(self._experts.split(targets)), self._stored.tensor(key)
        for one in sorted(torn):
            self._convert(frozenset({one}))
            for _, tensor in self._experts.take():
                for name, view in self._experts.parts(one, tensor, names):
                    yield name, name, view.clone(memory_format=torch.contiguous_format)

    def stored_sizes(self, names: frozenset[str]) -> Iterator[tuple[str, tuple[int, ...], int]]:
        fused, torn = self._experts.fused(names), self._experts.torn(names)
        for key, targets in self._targets.items():
            if targets & fused and not targets <= torn:
                yield min(self._experts.split(targets)), self._stored[key].shape, self._stored[key].nbytes
        yield from expert_sizes(self.skeleton, self._experts.split(torn) & names)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        digest.update((self.folder / "config.json").read_bytes())
        files = self._stored.files
        for file in sorted({tensor.file for tensor in files.values()}):
            tensors = sorted((t.start, t.end, key) for key, t in files.items() if t.file == file)
            with file.open("rb") as handle:
                data = 8 + int.from_bytes(handle.read(8), "little")  # where it starts, behind the header
                for start, end, key in tensors:
                    digest.update(f"{key} {files[key].dtype} {files[key].shape}".encode())
                    for offset in (start, (start + end) // 2, max(start, end - SAMPLE_BYTES)):
                        handle.seek(data + offset)
                        digest.update(handle.read(min(SAMPLE_BYTES, end - start)))
        return digest.hexdigest()
