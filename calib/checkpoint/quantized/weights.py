"""`StoredWeights`: the tensors of a folder as the dense model knows them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from calib.checkpoint.json import read_json
from calib.checkpoint.quantized.compressed import compressed_weights
from calib.checkpoint.quantized.fp8 import fp8_weights
from calib.checkpoint.quantized.gptq import awq_weights, gptq_weights
from calib.checkpoint.quantized.methods import source_method
from calib.checkpoint.quantized.packed import PackedWeight, SourceQuantization
from calib.checkpoint.safetensors_header import StoredTensor
from calib.errors import ModelError

__all__ = ["StoredWeights", "open_weights", "packed_weights"]

_PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _PLAIN.items()}
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # where config.json says nothing
_SCALES = ("_scale", "_scale_inv", "_zero_point")  # of activations and the cache of keys and values
_MAX_BESIDE_BYTES = 8 << 20


class StoredWeights(Mapping[str, StoredTensor]):
    """Tensors of the dense model by name: those of the files, and for packed weights what they are dequantized to.

    Args:
        files: every tensor in the files.
        packed: the weights that are several tensors there.
        dtype: that packed weights are dequantized to.
        quantization: what is known of them, ``None`` for a model in full precision.

    Attributes:
        files: every tensor in the files, for what is about bytes on disk.
    """

    def __init__(
        self,
        files: Mapping[str, StoredTensor],
        packed: Mapping[str, PackedWeight] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        quantization: SourceQuantization | None = None,
    ) -> None:
        self.files, self.quantization = files, quantization
        self._packed, self._dtype = dict(packed or {}), dtype
        consumed = {part for weight in self._packed.values() for part in weight.parts.values()}
        self._shown = {name: tensor for name, tensor in files.items() if name not in consumed}
        self._shown |= {name: self._dense(weight) for name, weight in self._packed.items()}
        self._stored_as = {name: name for name in self._shown}
        self._transposed: set[str] = set()

    def _dense(self, weight: PackedWeight) -> StoredTensor:
        file = self.files[next(iter(weight.parts.values()))].file
        return StoredTensor(file, _NAMES[self._dtype], weight.shape, 0, math.prod(weight.shape) * self._dtype.itemsize)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._shown[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown)

    def __len__(self) -> int:
        return len(self._shown)

    def rename(self, name: str, new: str) -> None:
        """Show a tensor under another name (that of the weight that it is tied to)."""
        self._shown[new], self._stored_as[new] = self._shown.pop(name), self._stored_as.pop(name)

    def transpose(self, name: str) -> None:
        """Show a packed weight as the model stores it where that is ``[in, out]`` (transformers' ``Conv1D``)."""
        shown = self._shown[name]
        self._shown[name] = shown._replace(shape=shown.shape[::-1])
        self._transposed.add(self._stored_as[name])

    def is_packed(self, name: str) -> bool:
        """Whether this tensor is dequantized when it is read."""
        return self._stored_as[name] in self._packed

    def is_quantized_part(self, name: str) -> bool:
        """Whether this tensor has no meaning in a dense checkpoint: packed, or a scale that belongs to no weight."""
        return self.is_packed(name) or (self.quantization is not None and name.endswith(_SCALES))

    @contextlib.contextmanager
    def slices(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """These tensors by name, each read (and dequantized) when it is indexed with ``[...]``, not before."""
        with contextlib.ExitStack() as stack:
            handles: dict[Path, Any] = {}

            def tensor(name: str) -> Any:
                file = self.files[name].file
                if file not in handles:
                    handles[file] = stack.enter_context(safe_open(file, framework="pt"))
                return handles[file].get_slice(name)

            yield {name: self._slice(self._stored_as[name], tensor) for name in names}

    def tensor(self, name: str) -> Tensor:
        """One tensor, read whole; a packed one is dequantized."""
        with self.slices([name]) as found:
            result: Tensor = found[name][...]
        return result

    def _slice(self, stored: str, tensor: Any) -> Any:
        weight = self._packed.get(stored)
        if weight is None:
            return tensor(stored)
        parts = {role: tensor(part) for role, part in weight.parts.items()}
        return _PackedSlice(weight, parts, self._dtype, transposed=stored in self._transposed)


class _PackedSlice:
    """Stands where transformers expects a slice of a safetensors file: ``[...]`` reads and dequantizes."""

    def __init__(self, weight: PackedWeight, parts: Mapping[str, Any], dtype: torch.dtype, *, transposed: bool) -> None:
        self._weight, self._parts, self._dtype, self._transposed = weight, parts, dtype, transposed

    def __getitem__(self, index: Any) -> Tensor:
        try:
            dense = self._weight.dequantize({role: part[...] for role, part in self._parts.items()})
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:  # of the library that unpacks
            raise ModelError(f"{self._weight.name} cannot be dequantized: {error}") from error
        if self._transposed:
            dense = dense.T.contiguous()
        return dense.to(self._dtype)[index]


def open_weights(folder: Path, files: Mapping[str, StoredTensor], config: Any) -> StoredWeights:
    """The weights of a folder, dense or packed; afterwards ``config`` is that of the dense model.

    Args:
        folder: the model folder.
        files: every tensor in its files.
        config: the model's config; its ``quantization_config`` is taken off, its ``dtype`` is set where it has none.

    Raises:
        ModelError: a quantization that is not read, tensors that are missing or do not fit it.
    """
    holders = {id(one): one for one in (config, config.get_text_config())}.values()
    stated = next((found for one in holders if (found := getattr(one, "quantization_config", None))), None)
    stated = stated or _beside(folder, files)
    if not stated:
        return StoredWeights(files)
    stated = stated if isinstance(stated, Mapping) else stated.to_dict()
    method = source_method(str(folder), stated)
    packed = _packed(method, str(folder), files, stated)
    if not packed:
        raise ModelError(f"{folder} is quantized by its config ({method}), but its files hold no such weights.")
    names = {weight.name: weight for weight in packed}
    parts = {part for weight in packed for part in weight.parts.values()}
    both = next((name for name in names if name in files and name not in parts), None)
    if both is not None:
        raise ModelError(f"{folder} holds {both} twice, dense and quantized: which one counts cannot be known.")
    dtype = _dense_dtype(config, files, parts)
    for one in holders:
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    config.dtype = dtype
    summary = SourceQuantization.of(method, packed, str(dtype).removeprefix("torch."))
    return StoredWeights(files, names, dtype, summary)


def packed_weights(
    folder: Path, files: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> tuple[Mapping[str, Any], list[PackedWeight]]:
    """What a folder says of its quantization, and its packed weights, described and not read.

    Args:
        folder: the model folder.
        files: every tensor in its files.
        config: its ``config.json`` as plain data.

    Returns:
        The ``quantization_config`` with its ``quant_method``, empty for a model in full precision, and the weights.

    Raises:
        ModelError: see `open_weights`.
    """
    stated = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    stated = stated or _beside(folder, files) or {}
    if not stated:
        return {}, []
    method = source_method(str(folder), stated)
    return {**stated, "quant_method": method}, _packed(method, str(folder), files, stated)


def _beside(folder: Path, files: Mapping[str, StoredTensor]) -> Mapping[str, Any] | None:
    """What AutoGPTQ and AutoAWQ once wrote into a file of their own."""
    if not any(name.endswith(".qweight") for name in files):
        return None
    for file, method in _BESIDE.items():
        if (folder / file).is_file():
            found = read_json(folder / file, _MAX_BESIDE_BYTES)
            if isinstance(found, dict):
                return {"quant_method": method, **found}
    return None


def _packed(
    method: str, folder: str, files: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> list[PackedWeight]:
    def read(name: str) -> Tensor:
        with safe_open(files[name].file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    if method == "gptq":
        return gptq_weights(folder, files, config)
    if method == "awq":
        return awq_weights(folder, files, config)
    if method == "compressed-tensors":
        return compressed_weights(folder, files, config, read)
    return fp8_weights(folder, files, config)


def _dense_dtype(config: Any, files: Mapping[str, StoredTensor], parts: set[str]) -> torch.dtype:
    """The config's dtype; without one, that of the first floating tensor that is not quantized; else bfloat16."""
    stated = getattr(config, "dtype", None)
    stated = getattr(torch, stated, None) if isinstance(stated, str) else stated
    if stated in _NAMES:
        return stated  # type: ignore[no-any-return]
    plain = (_PLAIN[tensor.dtype] for name, tensor in files.items() if tensor.dtype in _PLAIN and name not in parts)
    return next(plain, torch.bfloat16)
