"""A reader of finished folders that shares no code with ptq: what the tensors say by docs/formats.md, in plain numpy.

It gives the weights of linears for their *original* inputs: a weight that is stored for rotated inputs is turned back
by an explicit Hadamard matrix. If weight and transform do not belong together, what comes out is not the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from scipy.linalg import block_diag
from scipy.linalg import hadamard as hadamard_matrix
from torch import Tensor

__all__ = ["dense_tensors", "rotation_matrix"]


def dense_tensors(folder: Path) -> dict[str, Tensor]:
    """Every parameter of the model that a folder describes, linears dequantized, for inputs as the model makes them."""
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            stored.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    dense = {}
    for name, scheme in _schemes(folder, stored).items():
        parts = {key: stored.pop(f"{name}.{key}", None) for key in ("weight_packed", "weight_scale", "weight_shape")}
        zero = stored.pop(f"{name}.weight_zero_point", None)
        stored.pop(f"{name}.weight", None)
        weight = _weight(parts, zero, scheme)
        rotation = scheme.get("input_rotation")
        if rotation is not None:
            assert rotation["kind"] == "hadamard"
            matrix = rotation_matrix(weight.shape[1], rotation["seed"], rotation["block"])
            weight = weight @ matrix  # stored is W R^T
        dense[f"{name}.weight"] = torch.from_numpy(weight).float()
    found = {name: tensor.float() for name, tensor in stored.items()} | dense
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    online = config.get("residual_rotation")
    return found if online is None else found | _merged(found, online)


def _merged(tensors: dict[str, Tensor], online: dict[str, Any]) -> dict[str, Tensor]:
    """Embedding, head and last norm of a model without biases that rotates nothing at run time."""
    (name,), norm = online["embeddings"], online["norm"]
    table, gain = tensors[f"{name}.weight"].double(), tensors[f"{norm}.weight"].double() + online["offset"]
    matrix = torch.from_numpy(_stream_matrix(table.shape[1], online["seed"]))
    assert not online["keep_ones"]
    return {
        f"{name}.weight": (table @ matrix.T).float(),
        "lm_head.weight": (table * gain @ matrix.T).float(),
        f"{norm}.weight": torch.full_like(gain, 1.0 - online["offset"]).float(),
    }


def _stream_matrix(width: int, seed: int) -> NDArray[np.float64]:
    """``Q`` of the residual stream: a Hadamard matrix of the power of two times a random orthogonal one, signed."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8) * 2 - 1
    power = width & -width
    drawn = torch.randn(width // power, width // power, generator=generator, dtype=torch.float64)
    q, r = np.linalg.qr(drawn.numpy())
    odd = q * np.sign(np.diagonal(r))
    matrix: NDArray[np.float64] = np.kron(hadamard_matrix(power) / np.sqrt(power), odd) * signs.numpy()[None, :]
    return matrix


def rotation_matrix(width: int, seed: int, block: int | None = None) -> NDArray[np.float64]:
    """``R = H diag(s)`` of the randomised Hadamard rotation, ``[width, width]``."""
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8) * 2 - 1
    divisor = width & -width
    if block is None and divisor >= 64:
        sizes = [divisor] * (width // divisor)
    else:
        largest = block or 1 << 30
        rest = width % largest
        sizes = [largest] * (width // largest) + [1 << i for i in range(30, -1, -1) if rest >> i & 1]
    blocks = block_diag(*[hadamard_matrix(size) / np.sqrt(size) for size in sizes])
    matrix: NDArray[np.float64] = blocks * signs.numpy()[None, :].astype(np.float64)
    return matrix


def _schemes(folder: Path, stored: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    names = sorted(name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed"))
    if config["quant_method"] == "ptq":
        assert sorted(config["layers"]) == names
        return {name: config["schemes"][config["layers"][name]] for name in names}
    (group,) = config["config_groups"].values()
    weights = group["weights"]
    scheme = {"bits": weights["num_bits"], "symmetric": weights["symmetric"], "group_size": weights["group_size"]}
    return dict.fromkeys(names, scheme)


def _weight(parts: dict[str, Tensor | None], zero_point: Tensor | None, scheme: dict[str, Any]) -> NDArray[np.float64]:
    packed, scale, shape = (parts[key] for key in ("weight_packed", "weight_scale", "weight_shape"))
    assert packed is not None
    assert scale is not None
    assert shape is not None
    (rows, width), bits = shape.tolist(), scheme["bits"]
    group = np.arange(width) // (scheme["group_size"] or width)
    codes = _unpack(packed, bits, width)
    if scheme["symmetric"]:
        assert zero_point is None
        zero = np.full(scale.shape, 2 ** (bits - 1))
    else:
        assert zero_point is not None
        zero = _unpack(zero_point.T, bits, rows).T
    values: NDArray[np.float64] = (codes - zero[:, group]) * scale.double().numpy()[:, group]
    return values


def _unpack(words: Tensor, bits: int, count: int) -> NDArray[np.int64]:
    stream = np.unpackbits(words.contiguous().numpy().astype("<i4").view(np.uint8), axis=1, bitorder="little")
    codes: NDArray[np.int64] = stream[:, : count * bits].reshape(len(words), count, bits).astype(np.int64) @ (
        1 << np.arange(bits)
    )
    return codes
