"""Quantized folders of other programs as the start of an export: the same codes and scales, described by a report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_targets
from safetensors import safe_open
from torch import Tensor, nn

from calib.checkpoint.atomic_files import file_sha256, os_errors
from calib.checkpoint.config import check_config
from calib.checkpoint.files import stored_tensors
from calib.checkpoint.quantized import PackedWeight, packed_weights
from calib.checkpoint.safetensors_header import StoredTensor
from calib.runner.forward import check_weight
from ptq.containers.base import Container
from ptq.containers.float_schemes import PAIRS, preset_scheme
from ptq.containers.select import CONTAINERS
from ptq.errors import UsageError
from ptq.export.result import Part, Result
from ptq.quantized import QuantizedWeight
from ptq.recipe import Recipe
from ptq.report import IMPORTED, KeptTensor, LayerRecord, Report
from ptq.scheme import Scheme

__all__ = ["ImportedResult", "imported_report"]

_DTYPES = {"F16": "float16", "BF16": "bfloat16"}
_FIELDS = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DENSE = "Exports to bf16, f16 and f32 read it."


class ImportedResult(Result):
    """A folder that another program quantized, seen as a result of ptq.

    Args:
        folder: with GPTQ, AWQ or compressed-tensors weights.
        trust_remote_code: run modelling code that ships with the model.

    Raises:
        ModelError: a folder that is damaged, or that is not read.
        UsageError: weights that no scheme of ptq describes bit by bit.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self._stored = stored_tensors(folder)
        self.config = check_config(folder, trust_remote_code=trust_remote_code, stored=self._stored)
        stated, packed = packed_weights(folder, self._stored, self.config)
        if not packed:
            raise UsageError(f"{folder} is not quantized: ptq quantize begins with such a model.")
        method = str(stated["quant_method"])
        if method not in ("gptq", "awq", "compressed-tensors"):
            raise UsageError(f"{folder} is quantized as {method}, which only dequantized formats can hold. {_DENSE}")
        self._packed = {weight.name.removesuffix(".weight"): weight for weight in packed}
        describe = _described_groups(stated) if method == "compressed-tensors" else self._integers(stated)
        dtype = getattr(torch, _model_dtype(self.config))
        self.schemes = {
            name: describe(name, weight, self._stored).resolved(dtype) for name, weight in self._packed.items()
        }
        # GPTQModel takes 1 off whole words; undone, the zero points are those of the second version.
        self._by_words = method == "gptq" and str(stated.get("meta")).count("gptqmodel") > 0 and _first_version(stated)
        name = "gptq_v2" if method == "gptq" and (self._by_words or not _first_version(stated)) else method
        self.container: Container = CONTAINERS[name]
        self.report = imported_report(self, name)
        self.rows = {record.name: record for record in self.report.layers}
        unknown = next((one for one in self.rows if one not in self.linears), None)
        if unknown is not None:
            raise UsageError(f"{unknown} is no linear of the model as transformers builds it. {_DENSE}")

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """See `Result.read`."""
        found = dict(tensors)
        scheme, zeros = self.schemes[name], f"{name}.qzeros"
        if self._by_words and scheme.bits != 3:
            ones = sum(1 << place for place in range(0, 32, scheme.bits))
            found[zeros] = (found[zeros].long() + ones).to(torch.int32)
        elif self._by_words:
            raise UsageError(f"{name} has 3 bits in the first version of GPTQ's layout. {_DENSE}")
        order = found.get(f"{name}.g_idx")
        width = self._packed[name].shape[1]
        if order is not None and not torch.equal(order.long(), scheme.group_index(width)):
            raise UsageError(f"{name} has its groups in another order (desc_act), which only GPTQ holds. {_DENSE}")
        return super().read(name, found)

    def contents(self, path: Path) -> tuple[list[str], dict[str, StoredTensor]]:
        """See `Result.contents`; a linear belongs to the file of its codes."""
        own = [name for name, weight in self._packed.items() if self._home(weight) == path.name]
        parts = {part for weight in self._packed.values() for part in weight.parts.values()}
        others = {
            key: one
            for key, one in self._stored.items()
            if one.file.name == path.name and key not in parts and key.rpartition(".")[2] not in _LEFT
        }
        return sorted(own), others

    def parts(self) -> Iterator[Part]:
        """See `Result.parts`."""
        for path in self.files:
            names, others = self.contents(path)
            wanted = [*others, *(part for name in names for part in self._all_parts(name))]
            yield Part(path.stem, self._tensors(wanted), {name: self.rows[name] for name in names}, self)

    def _all_parts(self, name: str) -> list[str]:
        known = {*self._packed[name].parts.values(), *(f"{name}.{role}" for role in _BESIDE)}
        return sorted(part for part in known if part in self._stored)

    def _home(self, weight: PackedWeight) -> str:
        return self._stored[next(iter(weight.parts.values()))].file.name

    def _tensors(self, names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in {self._stored[name].file for name in names}:
            with os_errors(file, "read"), safe_open(file, framework="pt") as handle:
                for name in names:
                    if self._stored[name].file == file:
                        found[name] = handle.get_tensor(name)
                        if found[name].dtype in _CHECKED:  # scales among them
                            check_weight(found[name], name)
        return found

    def _integers(self, stated: Mapping[str, Any]) -> Any:
        """Schemes of GPTQ and AWQ: the numbers of the config, and what the tensors show."""
        size = stated.get("group_size", stated.get("q_group_size", -1))

        def describe(name: str, weight: PackedWeight, stored: Mapping[str, StoredTensor]) -> Scheme:
            groups, width = stored[f"{name}.scales"].shape[0], weight.shape[1]
            group = size if isinstance(size, int) and 0 < size < width else None
            if (1 if group is None else math.ceil(width / group)) != groups:
                if width % groups:
                    raise UsageError(f"{name} has {groups} groups for {width} input channels. {_DENSE}")
                group = None if groups == 1 else width // groups  # of a linear with a scheme of its own
            zeros = self._tensors([f"{name}.qzeros"])[f"{name}.qzeros"].view(torch.uint8)
            return Scheme(
                weight.bits, _centred(zeros, weight.bits, stated), group, _scale_dtype(name, "scales", stored)
            )

        return describe


_BESIDE = ("g_idx", "weight_zero_point", "weight_global_scale", "input_global_scale", "input_scale")
_LEFT = ("input_scale", "input_global_scale", "k_scale", "v_scale", "weight_g_idx")


def imported_report(result: Any, container: str) -> Report:
    """What is known of a folder of another program.

    Args:
        result: the folder, with its schemes.
        container: its name.
    """
    layers = tuple(_record(name, result.schemes[name], weight.shape) for name, weight in result._packed.items())
    parts = {part for weight in result._packed.values() for part in weight.parts.values()}
    rest = {key: one for key, one in result._stored.items() if key not in parts}
    kept = tuple(KeptTensor(key, "in full precision there", one.nbytes) for key, one in rest.items())
    files = sorted({one.file for one in result._stored.values()})
    dtype = _model_dtype(result.config)
    quantized = sum(math.prod(row.shape) for row in layers)
    others = sum(math.prod(one.shape) for one in rest.values())
    payload, bytes_of = sum(row.payload_bytes for row in layers), getattr(torch, dtype).itemsize
    usual = dataclasses.replace(Recipe(), scheme=next(iter(result.schemes.values())))
    return Report(
        model={
            "source": str(result.folder),
            "architecture": next(iter(result.config.get("architectures") or ["unknown"])),
            "model_type": result.config.get("model_type", "unknown"),
            "parameters": quantized + others,
            "dtype": dtype,
            "fingerprint": None,
        },
        recipe=usual.record() | {"method": IMPORTED},
        calibration=None,
        container=container,
        container_reason="written by another program",
        layers=layers,
        kept=kept,
        totals={
            "quantized_parameters": quantized,
            "kept_parameters": others,
            "payload_bytes": payload,
            "kept_bytes": sum(one.bytes for one in kept),
            "file_bytes": sum(path.stat().st_size for path in files),
            "source_bytes": (quantized + others) * bytes_of,
            "bits_per_weight": 8 * payload / quantized,
            "seconds": 0.0,
        },
        timing={},
        environment={"versions": {}},
        files={path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files},
    )


def _record(name: str, scheme: Scheme, shape: tuple[int, ...]) -> LayerRecord:
    out_features, in_features = shape
    payload = math.ceil(scheme.number_format.payload_bits(out_features, in_features, scheme) / 8)
    return LayerRecord(
        name=name,
        method=IMPORTED,
        scheme=scheme.record(),
        shape=(out_features, in_features),
        bits_per_weight=8 * payload / (out_features * in_features),
        payload_bytes=payload,
    )


def _model_dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")


def _first_version(stated: Mapping[str, Any]) -> bool:
    return (stated.get("checkpoint_format") or stated.get("format") or "gptq") == "gptq"


def _centred(zeros: Tensor, bits: int, stated: Mapping[str, Any]) -> bool:
    """Whether all stored zero points are the middle, by the bytes of the packed words; of 3 bits the config says."""
    if 8 % bits:
        return bool(stated.get("sym", False))
    first = stated["quant_method"] == "gptq" and _first_version(stated)
    middle = 2 ** (bits - 1) - (1 if first else 0)
    byte = sum(middle << place for place in range(0, 8, bits))
    return bool((zeros == byte).all())


def _scale_dtype(name: str, role: str, stored: Mapping[str, StoredTensor]) -> Any:
    dtype = stored[f"{name}.{role}"].dtype
    if dtype not in _DTYPES:
        raise UsageError(f"{name}.{role} is {dtype}, and ptq stores scales in float16 or bfloat16. {_DENSE}")
    return _DTYPES[dtype]


def _described_groups(stated: Mapping[str, Any]) -> Any:
    """Schemes of compressed-tensors by the groups of its config."""
    config = QuantizationConfig.model_validate({k: v for k, v in stated.items() if k != "quant_method"})
    targets = {target: group for group in config.config_groups.values() for target in group.targets}

    def describe(name: str, weight: PackedWeight, stored: Mapping[str, StoredTensor]) -> Scheme:
        matches = match_targets(name, nn.Linear(1, 1, device="meta"), targets)
        group = targets[matches[0]]
        storage = str(getattr(group.format, "value", group.format) or config.format)
        for pair, (_, written) in PAIRS.items():
            if storage == written and _alike(group, preset_scheme(pair, [])):
                return Scheme.of(pair[0], act_format=pair[1])
        weights = group.weights
        plain = storage == "pack-quantized" and str(weights.type) == "int" and group.input_activations is None
        if not plain or str(weights.strategy) not in ("group", "channel"):
            raise UsageError(
                f"{name} is {storage} with {weights.strategy} scales, which ptq has no scheme for. {_DENSE}"
            )
        scale = _scale_dtype(name, "weight_scale", stored)
        return Scheme(weights.num_bits, bool(weights.symmetric), weights.group_size or None, scale)

    return describe


def _alike(found: QuantizationScheme, preset: QuantizationScheme) -> bool:
    """Whether two schemes store and compute the same."""
    for mine, theirs in ((found.weights, preset.weights), (found.input_activations, preset.input_activations)):
        if (mine is None) != (theirs is None):
            return False
        if mine is not None and any(getattr(mine, field) != getattr(theirs, field) for field in _FIELDS):
            return False
    return True
