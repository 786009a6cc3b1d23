"""The AWQ container, layout GEMM, as GPTQModel, transformers (with gptqmodel), vLLM and SGLang read it.

The tensors of a linear ``[out, in]`` (layout: `calib.checkpoint.quantized.gptq`):

    X.qweight  int32  [in, out/8]      eight output channels per word, in the order 0 2 4 6 1 3 5 7 from the lowest bits
    X.qzeros   int32  [groups, out/8]  zero points, likewise, stored as they are
    X.scales   fp16 or bf16  [groups, out]

There is one width, 4 bits, and one group size per checkpoint; other linears are in full precision, by their names.
Readers expect zero points, so that symmetric weights are written with the zero point 8: the same values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib.model.structure import linear_weight
from ptq.containers.base import Container
from ptq.containers.common import check_tensors, model_problem, plain_integers
from ptq.errors import OutputError
from ptq.packing.bits import pack_rows, unpack_rows
from ptq.quantized import QuantizedWeight
from ptq.scheme import KeyValueScheme, Scheme

__all__ = ["AWQ", "AwqContainer"]

_BITS = 4
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # output channel of every nibble
_INVERSE = torch.argsort(_ORDER)
_PER_WORD = 8
_MULTIPLE = 32  # of both sizes and of groups, as the kernels of the readers have it


class AwqContainer(Container):
    """4 bits in one group size."""

    name = "awq"
    quant_method = "awq"

    def unsupported_reason(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        model: nn.Module,
        key_values: KeyValueScheme | None,
    ) -> str | None:
        first: tuple[str, Scheme] | None = None
        for name, scheme in schemes.items():
            if scheme is None:
                continue
            linear = linears[name]
            problem = plain_integers(name, scheme, linear, self.quant_method) or _layout_problem(name, scheme, linear)
            if problem is not None:
                return problem
            first = first or (name, scheme)
            if first[1].group_size != scheme.group_size:
                return (
                    f"{name} is {scheme.describe()} and {first[0]} {first[1].describe()}, and awq has one group size "
                    "for all: leave one of them in full precision (--ignore)"
                )
        return model_problem(model, key_values)

    def layer_tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `Container.layer_tensors`."""
        zeros = weight.params.get("zero")
        if zeros is None:
            groups = weight.scheme.groups(weight.shape[1])
            zeros = torch.full((weight.shape[0], groups), 2 ** (_BITS - 1), dtype=torch.uint8)
        return {
            f"{name}.qweight": _pack(weight.codes.cpu()),
            f"{name}.qzeros": _pack(zeros.cpu()),
            f"{name}.scales": weight.params["scale"].cpu().T.contiguous(),
        }

    def read_layer(
        self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedWeight:
        """See `Container.read_layer`."""
        out_features, in_features = shape
        groups = scheme.groups(in_features)
        wanted = {
            "qweight": (in_features, out_features // _PER_WORD),
            "qzeros": (groups, out_features // _PER_WORD),
            "scales": (groups, out_features),
        }
        group = scheme.group_size or in_features
        check_tensors(name, tensors, wanted, f"awq of {out_features} x {in_features} in groups of {group}")
        params = {"scale": tensors[f"{name}.scales"].T.contiguous()}
        zeros = _unpack(tensors[f"{name}.qzeros"], out_features)
        if not scheme.symmetric:
            params["zero"] = zeros
        elif bool((zeros != 2 ** (_BITS - 1)).any()):
            raise OutputError(f"{name}.qzeros has other zero points than 8, and {name} is symmetric by its report.")
        return QuantizedWeight(_unpack(tensors[f"{name}.qweight"], out_features), params, scheme)

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        *,
        key_values: KeyValueScheme | None = None,
        others: Iterable[str] = (),
    ) -> dict[str, Any]:
        """See `Container.quantization_config`."""
        group_size = next(scheme.group_size for scheme in schemes.values() if scheme is not None)
        kept = [name for name in linears if schemes.get(name) is None]
        return {
            "quant_method": self.quant_method,
            "bits": _BITS,
            "group_size": -1 if group_size is None else group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": sorted({*kept, *others}),
        }

    def config_changes(self, dtype: torch.dtype) -> dict[str, Any]:
        """Readers compute in half precision."""
        return {"dtype": "float16"} if dtype == torch.float32 else {}


def _layout_problem(name: str, scheme: Scheme, linear: nn.Module) -> str | None:
    """Why a linear's sizes are not those of the layout."""
    if scheme.bits != _BITS:
        return f"{name} has {scheme.bits} bits, and awq takes 4: gptq takes 2, 3, 4 and 8, compressed-tensors 2 to 8"
    rows, columns = linear_weight(linear).shape
    if rows % _MULTIPLE or columns % _MULTIPLE:
        return f"{name} is {rows} x {columns}, and awq takes multiples of {_MULTIPLE}"
    if scheme.group_size is not None and scheme.group_size % _MULTIPLE:
        return f"{name} has groups of {scheme.group_size}, and awq takes multiples of {_MULTIPLE}"
    return None


def _pack(values: Tensor) -> Tensor:
    """uint8 ``[out, n]`` to int32 ``[n, out/8]``."""
    out_features, columns = values.shape
    nibbles = values.T.reshape(columns, -1, _PER_WORD)[..., _ORDER]
    return pack_rows(nibbles.reshape(columns, out_features).contiguous(), _BITS)


def _unpack(words: Tensor, out_features: int) -> Tensor:
    """The inverse of `_pack`."""
    nibbles = unpack_rows(words, _BITS, out_features).reshape(len(words), -1, _PER_WORD)[..., _INVERSE]
    return nibbles.reshape(len(words), out_features).T.contiguous()


AWQ = AwqContainer()
