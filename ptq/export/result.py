"""`Result`: a folder of ``ptq quantize`` opened for reading, one weight file in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from calib.checkpoint.atomic_files import os_errors
from calib.checkpoint.config import check_config
from calib.checkpoint.files import stored_tensors
from calib.checkpoint.safetensors_header import StoredTensor
from calib.checkpoint.sources.folder import build_skeleton
from calib.model.experts import split_experts
from calib.model.structure import all_linears
from ptq.checkpoint.verify import verify_files
from ptq.containers.native import GUARD_KEY, NATIVE, read_key_values, read_residual_rotation
from ptq.containers.select import CONTAINERS
from ptq.errors import OutputError, UsageError
from ptq.quantized import QuantizedWeight
from ptq.report import LayerRecord, Report
from ptq.scheme import KeyValueScheme, Scheme
from ptq.transforms.rotation.online import StreamRotation

__all__ = ["Part", "Result"]


class Part:
    """One weight file in memory: its quantized linears, and its other tensors as they are stored.

    Args:
        name: of the file, without its suffix.
        tensors: everything in it.
        rows: reports of the linears of the whole result, by name.
        result: where it belongs.
    """

    def __init__(self, name: str, tensors: dict[str, Tensor], rows: Mapping[str, LayerRecord], result: Result) -> None:
        self.name, self._tensors, self._result = name, tensors, result
        owners = {key: key.rpartition(".")[0] for key in tensors}
        quantized = {owner: rows[owner] for owner in sorted(set(owners.values())) if owner in rows}
        self._rows = quantized
        kept_roles = ("bias",)
        self.others: dict[str, Tensor] = {
            key: tensor
            for key, tensor in tensors.items()
            if owners[key] not in quantized or key.rpartition(".")[2] in kept_roles
        }

    def linears(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Names and weights of the quantized linears in this file, made one at a time."""
        for name in self._rows:
            yield name, self._result.read(name, self._tensors)


class Result:
    """A finished output of ``ptq quantize`` or ``ptq export``.

    Args:
        folder: with ``ptq_report.json``.
        trust_remote_code: run modelling code that ships with the model.

    Raises:
        OutputError: not a finished result, or a file was changed since.
        ModelError: a config that cannot be read.
        UsageError: a result whose weights are in full precision by now.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.report = Report.load(folder)
        if self.report.container not in CONTAINERS:
            raise UsageError(
                f"{folder} was exported as {self.report.container}, where nothing is quantized any more: export from "
                "the result of ptq quantize."
            )
        verify_files(folder)
        self.container = CONTAINERS[self.report.container]
        self.config: dict[str, Any] = check_config(
            folder, trust_remote_code=trust_remote_code, stored=stored_tensors(folder)
        )
        self.rows = {record.name: record for record in self.report.layers}
        self.schemes: dict[str, Scheme] = {name: Scheme.from_dict(row.scheme) for name, row in self.rows.items()}

    @property
    def plain_config(self) -> dict[str, Any]:
        """The config without a word on quantization."""
        return {key: value for key, value in self.config.items() if key not in ("quantization_config", GUARD_KEY)}

    @property
    def key_values(self) -> KeyValueScheme | None:
        """How keys and values are rounded at run time; ``None`` where they are not."""
        if self.container is not NATIVE:
            return None
        return read_key_values(self.config["quantization_config"], str(self.folder / "config.json"))

    @property
    def residual_rotation(self) -> StreamRotation | None:
        """How the residual stream is rotated at run time; ``None`` where it is not."""
        if self.container is not NATIVE:
            return None
        return read_residual_rotation(self.config["quantization_config"], str(self.folder / "config.json"))

    @cached_property
    def skeleton(self) -> Any:
        """The model without weights, experts split."""
        kind = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code, local_files_only=True)
        for key in ("quantization_config", GUARD_KEY):
            if hasattr(kind, key):
                delattr(kind, key)
        with init_empty_weights(include_buffers=False):
            model = build_skeleton(kind, self.dtype, self.trust_remote_code).eval()
        split_experts(model)
        return model

    @property
    def dtype(self) -> torch.dtype:
        """Of the model in full precision."""
        dtype: torch.dtype = getattr(torch, str(self.report.model["dtype"]))
        return dtype

    @cached_property
    def linears(self) -> dict[str, nn.Module]:
        """All linears of the skeleton by full name."""
        return all_linears(self.skeleton)

    @property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        return [self.folder / name for name in sorted(self.report.files)]

    def contents(self, path: Path) -> tuple[list[str], dict[str, StoredTensor]]:
        """Names of the quantized linears of a weight file, in the order of `Part.linears`, and its other tensors."""
        stored = {key: one for key, one in stored_tensors(self.folder).items() if one.file.name == path.name}
        owners = {key: key.rpartition(".")[0] for key in stored}
        names = sorted({owner for owner in owners.values() if owner in self.rows})
        others = {
            key: one for key, one in stored.items() if owners[key] not in self.rows or key.rpartition(".")[2] == "bias"
        }
        return names, others

    def parts(self) -> Iterator[Part]:
        """The weight files, one in memory at a time.

        Raises:
            OutputError: a file cannot be read.
        """
        for path in self.files:
            with os_errors(path, "read"):
                tensors = load_file(path)
            yield Part(path.stem, tensors, self.rows, self)

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """A linear from the tensors of its file.

        Raises:
            OutputError: they are not what the report says.
        """
        own = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        if not own:
            raise OutputError(f"{self.folder} has no tensors of {name}, which its report lists: quantize again.")
        return self.container.read_layer(name, own, self.schemes[name], self.rows[name].shape)
