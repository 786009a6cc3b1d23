"""The native format: every scheme of the toolkit, one scheme per linear, read by `ptq.integration`.

``config.json`` of a native checkpoint holds

    "quantization_config": {
      "quant_method": "ptq", "version": 1,
      "schemes": {"int3-asym-g64-float16": {"format": "int", "bits": 3, "symmetric": false, ...}},
      "layers": {"model.layers.0.mlp.down_proj": "int3-asym-g64-float16", ...},
      "check": "0123456789abcdef"
    },
    "transformers_weights": "these weights are packed by ptq: run `pip install ptq-toolkit` and ..."

A scheme has all fields of `ptq.scheme.Scheme`. Where keys and values are rounded at run time, beside the schemes stands

      "key_values": {"bits": 4, "symmetric": false}

and where the residual stream is rotated at run time (`ptq.transforms.rotation.online`)

      "residual_rotation": {"seed": 0, "keep_ones": false, "embeddings": ["model.embed_tokens"],
                            "norm": "model.norm", "offset": 0.0}

``check`` is a checksum over the other keys: no tensor shows that the seed of a rotation is another one, and a model
that was saved again has no report that says so.

transformers only warns about a quantization method that it does not know, and goes on with random weights. Two things
turn that into an error: ``transformers_weights`` (transformers takes it for the name of the weight file and raises an
error that quotes it; our quantizer removes it first), and for every packed linear an empty tensor ``X.weight`` (int8,
shape [0]), which a plain linear refuses by its shape even where ``save_pretrained`` has dropped the sentence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ptq.containers.base import Container
from ptq.errors import OutputError, UsageError
from ptq.quantized import QuantizedWeight
from ptq.report import canonical_json
from ptq.scheme import KeyValueScheme, Scheme
from ptq.transforms.rotation.online import StreamRotation

__all__ = [
    "GUARD_KEY",
    "GUARD_SENTENCE",
    "NATIVE",
    "QUANT_METHOD",
    "VERSION",
    "NativeContainer",
    "config_checksum",
    "read_key_values",
    "read_residual_rotation",
    "read_schemes",
    "verify_config",
    "with_checksum",
    "with_residual_rotation",
]

T = TypeVar("T")
QUANT_METHOD = "ptq"
VERSION = 1
GUARD_KEY = "transformers_weights"
GUARD_SENTENCE = (
    "these weights are packed by ptq: run `pip install ptq-toolkit` and `import ptq` before from_pretrained"
)


class NativeContainer(Container):
    """Carries every scheme of the toolkit."""

    name = "native"
    quant_method = QUANT_METHOD

    def unsupported_reason(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        model: nn.Module,
        key_values: KeyValueScheme | None,
    ) -> str | None:
        return None

    def layer_tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The weight's tensors and the empty ``X.weight`` that plain linears refuse."""
        return weight.tensors(name) | {f"{name}.weight": torch.empty(0, dtype=torch.int8)}

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        *,
        key_values: KeyValueScheme | None = None,
        others: Iterable[str] = (),
    ) -> dict[str, Any]:
        """See `Container.quantization_config`; ``linears`` and ``others`` are not needed.

        Raises:
            ValueError: a scheme's ``scale_dtype`` is still ``"auto"``.
        """
        packed = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        for name, scheme in packed.items():
            if scheme.scale_dtype == "auto":
                raise ValueError(f"{name}: a checkpoint names the dtype of its scales; call Scheme.resolved first")
        keys = _scheme_keys(packed.values())
        config = {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "schemes": {key: scheme.to_dict() for scheme, key in keys.items()},
            "layers": {name: keys[scheme] for name, scheme in packed.items()},
        }
        if key_values is not None:
            config["key_values"] = key_values.to_dict()
        return with_checksum(config)

    def config_entries(self) -> dict[str, Any]:
        """The sentence that stops a transformers without us."""
        return {GUARD_KEY: GUARD_SENTENCE}


def config_checksum(config: Mapping[str, Any]) -> str:
    """The first 16 hex digits of the SHA-256 of a ``quantization_config`` without its ``check``."""
    return hashlib.sha256(canonical_json({k: v for k, v in config.items() if k != "check"})).hexdigest()[:16]


def with_checksum(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the ``check`` that belongs to its other keys."""
    return {**config, "check": config_checksum(config)}


def verify_config(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Compare a ``quantization_config`` with its ``check``; one of an earlier release has none.

    Raises:
        OutputError: it was changed after it was written.
    """
    stated = config.get("check")
    if stated is not None and stated != (found := config_checksum(config)):
        raise OutputError(
            f"{where}: quantization_config was changed after it was written: its checksum is {found}, and check says "
            f"{stated}. With other schemes the same tensors are another model: copy {where} again or quantize again; "
            "if the change is wanted, remove check, or load with ptq.load(..., verify=False)."
        )


def read_schemes(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Scheme]:
    """Scheme of every packed linear, from a ``quantization_config``.

    Raises:
        OutputError: another version, or a config that does not hold together.
    """
    _check_version(config, where)
    try:
        known = {key: Scheme.from_dict(fields) for key, fields in config["schemes"].items()}
        return {name: known[key] for name, key in config["layers"].items()}
    except (AttributeError, KeyError, TypeError, UsageError) as error:
        raise OutputError(f"{where}: quantization_config is damaged ({error!r}); quantize again.") from error


def read_key_values(config: Mapping[str, Any], where: str = "config.json") -> KeyValueScheme | None:
    """How keys and values are rounded, from a ``quantization_config``; ``None`` where they are not.

    Raises:
        OutputError: another version, or an entry ``key_values`` that is not one.
    """
    return _entry(config, "key_values", lambda fields: KeyValueScheme(fields["bits"], fields["symmetric"]), where)


def read_residual_rotation(config: Mapping[str, Any], where: str = "config.json") -> StreamRotation | None:
    """How the residual stream is rotated at run time, from a ``quantization_config``; ``None`` where it is not.

    Raises:
        OutputError: Another version, or an entry ``residual_rotation`` that is not one.
    """
    return _entry(config, "residual_rotation", StreamRotation.from_dict, where)


def with_residual_rotation(config: Mapping[str, Any], rotation: StreamRotation | None) -> dict[str, Any]:
    """The ``quantization_config`` of a model whose residual stream is rotated at run time; ``None``: as it is."""
    return dict(config) if rotation is None else with_checksum({**config, "residual_rotation": rotation.to_dict()})


def _entry(config: Mapping[str, Any], key: str, read: Callable[[Any], T], where: str) -> T | None:
    """An entry beside the schemes, or ``None`` where there is none.

    Raises:
        OutputError: Another version, or an entry that ``read`` does not take.
    """
    _check_version(config, where)
    fields = config.get(key)
    if fields is None:
        return None
    try:
        return read(fields)
    except (KeyError, TypeError, UsageError) as error:
        raise OutputError(f"{where}: {key} is damaged ({error!r}); quantize again.") from error


def _check_version(config: Mapping[str, Any], where: str) -> None:
    version = config.get("version")
    if version != VERSION or isinstance(version, bool):
        raise OutputError(
            f"{where}: quantization_config has version {version!r}, this ptq reads version {VERSION}: "
            "upgrade ptq-toolkit, or quantize again."
        )


def _scheme_keys(schemes: Iterable[Scheme]) -> dict[Scheme, str]:
    """A readable key for every scheme; schemes of one name (two seeds of a rotation) are numbered."""
    keys: dict[Scheme, str] = {}
    for scheme in dict.fromkeys(schemes):
        key = f"{scheme.describe().replace(' ', '-')}-{scheme.scale_dtype}"
        same = sum(other == key or other.startswith(f"{key}.") for other in keys.values())
        keys[scheme] = f"{key}.{same + 1}" if same else key
    return keys


NATIVE = NativeContainer()
