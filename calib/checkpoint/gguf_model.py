"""A ``.gguf`` file as a model: its entries must describe the model that its tensors are.

transformers builds a model by the entries of the file, with defaults of billions of weights for those that are not
there, and looks at the tensors afterwards. So the model is built without memory first, and its weights are counted.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM

from calib.checkpoint.config import check_sizes
from calib.checkpoint.gguf_header import GgufHeader, read_gguf_header
from calib.checkpoint.json import quoted
from calib.checkpoint.sources.skeleton import quiet_transformers
from calib.errors import ModelError

__all__ = ["check_gguf_model"]

_FREE_WEIGHTS = 1 << 24
_MOST_OF_STORED = 2  # weights that are used twice, or merged on loading, are counted once or twice


def check_gguf_model(path: Path) -> GgufHeader:
    """Check a file before memory for its weights is taken.

    Args:
        path: The file.

    Returns:
        Its header.

    Raises:
        ModelError: See `read_gguf_header`; an architecture that transformers does not read; entries that describe a
            model of other sizes than the tensors'.
    """
    header = read_gguf_header(path)
    name = header.entries.get("general.architecture")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{path} has the general.architecture {quoted(name)}, not a name: it is no model.")
    try:
        config = _config(path, name, header)
        check_sizes(path, config.to_dict(), [tensor.shape for tensor in header.tensors])
        with quiet_transformers(), torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except ModelError:
        raise
    except Exception as error:  # config and model classes raise errors of many kinds for numbers that do not fit
        line = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"cannot read {path}: {type(error).__name__}: {line}") from error
    built = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(math.prod(tensor.shape) for tensor in header.tensors)
    if built > _FREE_WEIGHTS + _MOST_OF_STORED * stored:
        raise ModelError(
            f"{path} describes a {name} model of {built:,} weights, and its tensors have {stored:,}: entries are "
            f"missing or wrong. Fetch it again."
        )
    return header


def _config(path: Path, name: str, header: GgufHeader) -> Any:
    """What transformers makes of the entries of an architecture, read without the vocabulary, which takes seconds."""
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "model.gguf"
        entries = {key: value for key, value in header.entries.items() if key.startswith(f"{name}.")}
        table = next((tensor for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
        if table is not None and table.shape:
            entries.setdefault(f"{name}.vocab_size", table.shape[0])
        _write(short, name, entries)
        try:
            return AutoConfig.from_pretrained(folder, gguf_file=short.name)
        except Exception:  # some entries are arrays by block, of which the header has the lengths: read them all
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _write(path: Path, name: str, entries: Mapping[str, Any]) -> None:
    """A file of entries and one tensor."""
    writer = GGUFWriter(path, name)
    for key, value in entries.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            whole = writer.add_int64 if isinstance(value, int) and value < 0 else writer.add_uint64
            kinds: dict[type, Callable[[str, Any], None]] = {int: whole, bool: writer.add_bool}
            kinds |= {float: writer.add_float64, str: writer.add_string}
            kinds[type(value)](key, value)
    writer.add_tensor("output.weight", np.zeros(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
