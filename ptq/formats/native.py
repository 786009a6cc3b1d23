"""The native format: every scheme of the toolkit, one scheme per linear, read by `ptq.integration`.

``config.json`` of a native checkpoint holds

    "quantization_config": {
      "quant_method": "ptq", "version": 1,
      "schemes": {"int3-asym-g64-float16": {"bits": 3, "symmetric": false, "group_size": 64, "scale_dtype": "float16"}},
      "layers": {"model.layers.0.mlp.down_proj": "int3-asym-g64-float16", ...}
    },
    "transformers_weights": "these weights are packed by ptq: run `pip install ptq-toolkit` and ..."

Where anything happens at run time to what linears read, or to keys and values, the version is 2: schemes then have
``act_bits``, ``act_symmetric``, ``input_rotation`` where these are set (`ptq.scheme.Scheme`), and beside them stands

      "key_values": {"bits": 4, "symmetric": false}

A reader that knows version 1 only would leave this out and compute something else, so it must refuse.

transformers only warns about a quantization method that it does not know, and goes on with random weights. Two things
turn that into an error: ``transformers_weights`` (transformers takes it for the name of the weight file and raises an
error that quotes it; our quantizer removes it first), and for every packed linear an empty tensor ``X.weight`` (int8,
shape [0]), which a plain linear refuses by its shape even where ``save_pretrained`` has dropped the sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import OutputError, UsageError
from ptq.packing import integer
from ptq.quantized import QuantizedWeight
from ptq.scheme import KeyValueScheme, Scheme

__all__ = [
    "GUARD_KEY",
    "GUARD_SENTENCE",
    "QUANT_METHOD",
    "VERSIONS",
    "layer_tensors",
    "quantization_config",
    "read_key_values",
    "read_schemes",
]

QUANT_METHOD = "ptq"
VERSIONS = (1, 2)
"""What is read. Version 1 is written where the checkpoint has nothing that version 2 brought."""
GUARD_KEY = "transformers_weights"
GUARD_SENTENCE = (
    "these weights are packed by ptq: run `pip install ptq-toolkit` and `import ptq` before from_pretrained"
)


def layer_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of `integer.layer_tensors` and the empty ``X.weight`` that plain linears refuse."""
    return integer.layer_tensors(name, weight) | {f"{name}.weight": torch.empty(0, dtype=torch.int8)}


def quantization_config(
    schemes: Mapping[str, Scheme | None],
    linears: Mapping[str, nn.Module],
    key_values: KeyValueScheme | None = None,
) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``.

    Args:
        schemes: the scheme of every linear by full name; ``None`` stays in full precision and is not mentioned.
        linears: not needed by this format; the argument makes all formats alike.
        key_values: how keys and values are rounded at run time; ``None`` leaves them as they are.

    Raises:
        ValueError: a scheme's ``scale_dtype`` is still ``"auto"``.
    """
    packed = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    for name, scheme in packed.items():
        if scheme.scale_dtype == "auto":
            raise ValueError(f"{name}: a checkpoint names the dtype of its scales; call Scheme.resolved first")
    transformed = key_values is not None or any(scheme.transforms_input for scheme in packed.values())
    config = {
        "quant_method": QUANT_METHOD,
        "version": 2 if transformed else 1,
        "schemes": {_scheme_id(scheme): scheme.to_dict() for scheme in packed.values()},
        "layers": {name: _scheme_id(scheme) for name, scheme in packed.items()},
    }
    return config if key_values is None else config | {"key_values": key_values.to_dict()}


def read_schemes(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Scheme]:
    """Scheme of every packed linear, from a ``quantization_config``.

    Raises:
        OutputError: another version, or a config that does not hold together.
    """
    _check_version(config, where)
    try:
        known = {key: Scheme(**fields) for key, fields in config["schemes"].items()}
        return {name: known[key] for name, key in config["layers"].items()}
    except (AttributeError, KeyError, TypeError, UsageError) as error:
        raise OutputError(f"{where}: quantization_config is damaged ({error!r}); quantize again.") from error


def read_key_values(config: Mapping[str, Any], where: str = "config.json") -> KeyValueScheme | None:
    """How keys and values are rounded, from a ``quantization_config``; ``None`` where they are not.

    Raises:
        OutputError: another version, or an entry ``key_values`` that is not one.
    """
    _check_version(config, where)
    fields = config.get("key_values")
    if fields is None:
        return None
    try:
        return KeyValueScheme(fields["bits"], fields["symmetric"])
    except (KeyError, TypeError, UsageError) as error:
        raise OutputError(f"{where}: key_values is damaged ({error!r}); quantize again.") from error


def _check_version(config: Mapping[str, Any], where: str) -> None:
    version = config.get("version")
    if version not in VERSIONS or isinstance(version, bool):
        raise OutputError(
            f"{where}: quantization_config has version {version!r}, this ptq reads versions 1 and 2: "
            "upgrade ptq-toolkit, or quantize again."
        )


def _scheme_id(scheme: Scheme) -> str:
    rotation = "" if scheme.input_rotation is None else str(scheme.input_rotation)  # after "rotated"
    return f"{scheme.describe().replace(' ', '-')}{rotation}-{scheme.scale_dtype}"
