"""Models opened without loading them: config and tensor index first, weights block by block.

`open_model` gives a `ModelSource`. Its ``skeleton`` is the Hugging Face model with parameters on the meta device
(buffers such as rotary frequencies are real); ``load`` fills some of the parameters through transformers' own key
conversions, ``release`` empties them again. Tensors that are not quantized are handed out under their original names
and bytes (`raw_tensors`), so that they pass through a quantization unchanged.

Experts that transformers keeps in one tensor are split (`calib.model.experts`): the skeleton and all names here are
those of one linear an expert, whatever the checkpoint holds.

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
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from calib.checkpoint.config import check_config
from calib.checkpoint.files import CompanionRule, resolve_model, stored_tensors
from calib.checkpoint.quantized import SourceQuantization, StoredWeights, open_weights
from calib.checkpoint.safetensors_header import StoredTensor
from calib.checkpoint.text_part import TextPart, text_parameters
from calib.errors import ModelError
from calib.model.expert_tensors import ExpertTensors
from calib.model.experts import expert_lists, split_experts
from calib.model.model_class import find_model_class, is_multimodal

__all__ = ["FolderSource", "ModelSource", "ModuleSource", "open_model", "quiet_transformers", "unmerged_experts"]


_PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
_SAMPLE_BYTES = 1 << 12  # read at the start, middle and end of every tensor for the fingerprint


class ModelSource(Protocol):
    """A model whose parts are loaded when they are needed."""

    skeleton: PreTrainedModel
    name: str
    dtype: torch.dtype
    quantization: SourceQuantization | None
    """Of a checkpoint that was quantized already and is dequantized as it is read."""

    @property
    def folder(self) -> Path | None:
        """The folder of the checkpoint; ``None`` for a model in memory."""
        ...

    @property
    def companions(self) -> CompanionRule:
        """What may go along from ``folder`` beside the weights."""
        ...

    def stored_config(self) -> dict[str, Any]:
        """What ``config.json`` of these tensors says, as plain data, without ``config_changes``."""
        ...

    @property
    def config_changes(self) -> Mapping[str, Any]:
        """What the config of a model of these tensors says otherwise than the stored one (after a transform)."""
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
        """The tensors that these parameters are made of: ``(name to write it under, parameter, tensor)``.

        They are the checkpoint's, with their names there, except where only some parameters of a layer's experts are
        asked for: those are cut out of the fused tensor one by one, under their names in the split model and in the
        model's dtype. Ask for all that passes through a layer at once.
        """
        ...

    def unused(self) -> list[str]:
        """Names of tensors in the checkpoint that are no part of the model, and are left out."""
        ...

    def carried(self) -> dict[str, StoredTensor]:
        """Tensors of the checkpoint that are no part of the model, and go along: those of a multimodal checkpoint."""
        ...

    def stored_sizes(self, names: frozenset[str]) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """What `raw_tensors` would give, without reading it: ``(parameter, shape, bytes)``."""
        ...

    def fingerprint(self) -> str:
        """Identifies the weights: a hash over config, names, shapes and samples of every tensor."""
        ...


def open_model(
    model: str | Path | nn.Module, *, trust_remote_code: bool = False, text_only: bool = False
) -> ModelSource:
    """Open a model without loading its weights.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, or a module in memory.
        trust_remote_code: run modelling code that ships with the model.
        text_only: of a multimodal model, open the text part as a model of its own.

    Raises:
        ModelError: no weights, pickle files only, not a causal language model, a quantization that is not read,
            damaged files.
    """
    if isinstance(model, nn.Module):
        held = ModuleSource(model, getattr(model, "name_or_path", "") or type(model).__name__)
        return TextPart(held) if text_only and is_multimodal(held.skeleton) else held
    if str(model).endswith(".gguf"):
        return _open_gguf(Path(model))
    folder = resolve_model(str(model))
    stored = stored_tensors(folder)
    config = read_config(folder, trust_remote_code, stored)
    weights = open_weights(folder, stored, config)
    source = FolderSource(folder, str(model), config, trust_remote_code, weights, text_only)
    return TextPart(source) if text_only and is_multimodal(source.skeleton) else source


def read_config(folder: Path, trust_remote_code: bool = False, stored: Mapping[str, StoredTensor] | None = None) -> Any:
    """The model's config, checked to be that of a causal language model.

    Raises:
        ModelError: there is none, it cannot be read, or it is not one we quantize.
    """
    check_config(folder, trust_remote_code=trust_remote_code, stored=stored)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        config._attn_implementation = config._experts_implementation = None  # ours to choose, not the file's
    except Exception as error:  # config classes raise errors of many unrelated kinds
        raise ModelError(f"cannot read the config of {folder}: {type(error).__name__}: {error}") from error
    classes = config.architectures or []
    # transformers has causal heads for encoders such as BERT, and would put weights trained without a mask behind them.
    encoder = getattr(config, "is_decoder", None) is False and bool(classes)
    encoder = encoder and not any("CausalLM" in name or "LMHead" in name for name in classes)
    if config.is_encoder_decoder or encoder or find_model_class(config, trust_remote_code=trust_remote_code) is None:
        raise ModelError(
            f"{folder} is a {config.model_type} model, which is not a decoder-only causal language model; "
            f"ptq quantizes those."
        )
    return config


def _build(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
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
                model = _build(config, self.dtype, trust_remote_code)
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
        yield from _sizes_of_parts(self.skeleton, self._experts.split(torn) & names)

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
                    for offset in (start, (start + end) // 2, max(start, end - _SAMPLE_BYTES)):
                        handle.seek(data + offset)
                        digest.update(handle.read(min(_SAMPLE_BYTES, end - start)))
        return digest.hexdigest()


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
        yield from _sizes_of_parts(self.skeleton, self._experts.split(torn) & names)

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
            step = max(1, flat.numel() // _SAMPLE_BYTES)
            digest.update(f"{name} {tuple(value.shape)} {flat.double().sum().item()!r}".encode())
            digest.update(flat[::step].double().cpu().numpy().tobytes())
        return digest.hexdigest()


def _sizes_of_parts(model: nn.Module, names: frozenset[str]) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Parameters that are cut out of fused ones and come in the model's dtype."""
    for name in sorted(names):
        parameter = model.get_parameter(name)
        yield name, tuple(parameter.shape), parameter.nbytes


def unmerged_experts(model: nn.Module) -> str | None:
    """An expert's linear whose ``weight`` a transformers that does not split experts would not find by its name here.

    Args:
        model: the split skeleton.
    """
    lists = expert_lists(model)
    conversions: list[Any] = get_model_conversion_mapping(model) if lists else []  # type: ignore[arg-type]
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    for name, experts in lists.items():
        for parameter, linears in experts.layout.parameters.items():
            for linear in linears if not parameter.endswith("_bias") else ():
                found, _ = rename_source_key(f"{name}.0.{linear}.weight", renamings, converters)
                if found != f"{name}.{parameter}":
                    return f"{name}.0.{linear}"
    return None


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
        with quiet_transformers():
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
def quiet_transformers() -> Iterator[None]:
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
