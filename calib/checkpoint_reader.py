"""Models opened without loading them: config and tensor index first, weights block by block.

`open_model` gives a `ModelSource`. Its ``skeleton`` is the Hugging Face model with parameters on the meta device
(buffers such as rotary frequencies are real); ``load`` fills some of the parameters through transformers' own key
conversions, ``release`` empties them again. Tensors that are not quantized are handed out under their original names
and bytes (`raw_tensors`), so that they pass through a quantization unchanged.

Three kinds of model: a folder or hub id with safetensors (lazy), a ``.gguf`` file (dequantized by transformers on
opening) and a module in memory (copied block by block, never changed).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from calib.errors import ModelError
from calib.safe_files import checkpoint_files, resolve_model

__all__ = ["FolderSource", "ModelSource", "ModuleSource", "open_model"]


class ModelSource(Protocol):
    """A model whose parts are loaded when they are needed."""

    skeleton: PreTrainedModel
    name: str
    dtype: torch.dtype

    @property
    def folder(self) -> Path | None:
        """The folder of the checkpoint; ``None`` for a model in memory."""
        ...

    def tensor_names(self) -> frozenset[str]:
        """Full names of the parameters and buffers that the checkpoint has, without second names of tied ones."""
        ...

    def load(self, names: frozenset[str]) -> None:
        """Fill these parameters of the skeleton, on the CPU in the checkpoint's dtype; the caller may change them."""
        ...

    def release(self, names: frozenset[str]) -> None:
        """Give the memory of these parameters back."""
        ...

    def raw_tensors(self, names: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
        """The tensors that these parameters are made of, unchanged: ``(name in the checkpoint, parameter, tensor)``."""
        ...

    def fingerprint(self) -> str:
        """Identifies the weights: a hash over config, names, shapes and sizes (folder) or values (memory)."""
        ...


def open_model(model: str | Path | nn.Module, *, trust_remote_code: bool = False) -> ModelSource:
    """Open a model without loading its weights.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, or a module in memory.
        trust_remote_code: run modelling code that ships with the model.

    Raises:
        ModelError: no weights, pickle files only, not a causal language model, already quantized, damaged files.
    """
    if isinstance(model, nn.Module):
        return ModuleSource(model, getattr(model, "name_or_path", "") or type(model).__name__)
    if str(model).endswith(".gguf"):
        return _open_gguf(Path(model))
    folder = resolve_model(str(model))
    config = read_config(folder, trust_remote_code)
    return FolderSource(folder, str(model), config, trust_remote_code)


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's config, checked to be that of a causal language model in full precision.

    Raises:
        ModelError: there is none, it cannot be read, or it is not one we quantize.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the config of {folder}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config.get("quant_method", "unknown")
        raise ModelError(f"{folder} is quantized already ({method}); give the full-precision model.")
    remote = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if config.is_encoder_decoder or not (remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise ModelError(
            f"{folder} is a {config.model_type} model, which is not a decoder-only causal language model; "
            f"ptq quantizes those."
        )
    return config


class FolderSource:
    """A folder of safetensors; see `ModelSource`."""

    def __init__(self, folder: Path, name: str, config: Any, trust_remote_code: bool) -> None:
        self.folder: Path = folder
        self.name = name
        self._where = {}
        for file in checkpoint_files(folder):
            try:
                with safe_open(file, framework="pt") as handle:
                    self._where.update(dict.fromkeys(handle.keys(), file))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is not a readable safetensors file: {error}") from error
        dtype = getattr(config, "dtype", None) or self._stored_dtype()
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=self.dtype, trust_remote_code=trust_remote_code
            )
        self.skeleton: PreTrainedModel = model.eval()
        self._conversions: list[Any] = get_model_conversion_mapping(self.skeleton)
        known = dict(self.skeleton.state_dict())
        self._targets = {key: self._parameters_of(key, known) for key in self._where}
        self._check_complete()

    def _stored_dtype(self) -> torch.dtype:
        for key, file in self._where.items():
            with safe_open(file, framework="pt") as handle:
                dtype = handle.get_slice(key).get_dtype()
            if dtype in ("BF16", "F16", "F32"):
                return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
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
            return frozenset({name} & known.keys())
        converter = next(c for c in converters if pattern in c.source_patterns)
        first = converter.target_patterns[0]
        return frozenset({name.replace(first, target) for target in converter.target_patterns} & known.keys())

    def _check_complete(self) -> None:
        present = frozenset().union(*self._targets.values())
        tied = set(getattr(self.skeleton, "all_tied_weights_keys", {}) or {})
        missing = sorted({name for name, _ in self.skeleton.named_parameters()} - present - tied)
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ModelError(
                f"{self.folder} lacks {len(missing)} of the model's tensors ({shown}). Is the download complete, is "
                f"{type(self.skeleton).__name__} the right class?"
            )

    def tensor_names(self) -> frozenset[str]:
        return frozenset().union(*self._targets.values())

    def load(self, names: frozenset[str]) -> None:
        slices: dict[str, Any] = {}
        keys = [key for key, targets in self._targets.items() if targets & names]
        with contextlib.ExitStack() as stack, _quiet_transformers():
            files = {self._where[key] for key in keys}
            handles = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
            for key in keys:
                slices[key] = handles[self._where[key]].get_slice(key)
            config = LoadStateDictConfig(dtype=self.dtype, weight_mapping=copy.deepcopy(self._conversions))
            info, _ = convert_and_load_state_dict_in_model(self.skeleton, slices, config)
        problems = [*info.error_msgs, *info.conversion_errors.values()]
        problems += [f"{name} has shape {tuple(a)}, the model wants {tuple(b)}" for name, a, b in info.mismatched_keys]
        if problems:
            raise ModelError(f"cannot load from {self.folder}: {'; '.join(problems)}")
        self.skeleton.tie_weights()

    def release(self, names: frozenset[str]) -> None:
        release_parameters(self.skeleton, names, self.dtype)

    def raw_tensors(self, names: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
        for key, targets in self._targets.items():
            if not targets & names:
                continue
            if not targets <= names:
                raise ModelError(f"the tensor {key} holds linears that are quantized and some that are not.")
            with safe_open(self._where[key], framework="pt") as handle:
                yield key, min(targets), handle.get_tensor(key)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        digest.update((self.folder / "config.json").read_bytes())
        for file in sorted(set(self._where.values())):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as handle:
                digest.update(handle.read(1 << 20))
        return digest.hexdigest()


class ModuleSource:
    """A model in memory; see `ModelSource`. Blocks are copied, the model itself stays as it is."""

    folder: Path | None = None

    def __init__(self, model: nn.Module, name: str) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings") or config.is_encoder_decoder:
            raise ModelError(f"{type(model).__name__} is not a causal language model of transformers.")
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"{name} is quantized already; give the full-precision model.")
        self._model: Any = model
        self.name = name
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        with init_empty_weights(include_buffers=False):
            skeleton: Any = type(self._model)(copy.deepcopy(config))
        self.skeleton: PreTrainedModel = skeleton.to(self.dtype).eval()
        self.skeleton.tie_weights()

    def load(self, names: frozenset[str]) -> None:
        state = self._state()
        values = {name: state[name].detach().to("cpu", copy=True) for name in names}
        self.skeleton.load_state_dict(values, assign=True, strict=False)
        self.skeleton.tie_weights()

    def release(self, names: frozenset[str]) -> None:
        release_parameters(self.skeleton, names, self.dtype)

    def raw_tensors(self, names: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
        for name, value in self._state().items():
            if name in names:
                yield name, name, value.detach().cpu()

    def _state(self) -> Mapping[str, Tensor]:
        """The state without tensors that are another name of one before (tied weights)."""
        tied = set(getattr(self._model, "all_tied_weights_keys", {}) or {})
        state: dict[str, Tensor] = self._model.state_dict()
        return {name: value for name, value in state.items() if name not in tied}

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._state())

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._model.config.to_dict(), sort_keys=True, default=str).encode())
        for name, value in self._state().items():
            digest.update(f"{name} {tuple(value.shape)} {value.double().sum().item()!r}".encode())
        return digest.hexdigest()


def release_parameters(model: nn.Module, names: frozenset[str], dtype: torch.dtype) -> None:
    """Put parameters back on the meta device, as the skeleton had them."""
    for name in names:
        module, _, leaf = name.rpartition(".")
        part = model.get_submodule(module)
        parameter = part._parameters.get(leaf)
        if parameter is not None:
            empty = torch.empty_like(parameter, dtype=dtype, device="meta")
            part._parameters[leaf] = nn.Parameter(empty, requires_grad=False)


def _open_gguf(file: Path) -> ModuleSource:
    """Dequantized to bfloat16 by transformers; the whole model is in memory."""
    if not file.is_file():
        raise ModelError(f"there is no file {file}.")
    try:
        with _quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    plain: Any = type(model)(config)
    plain = plain.to(torch.bfloat16)
    plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    return ModuleSource(plain, str(file))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No loading bars and reports of transformers for every block; its errors are raised as usual."""
    level = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
