"""The GPTQ container, as GPTQModel, transformers (with optimum and gptqmodel) and vLLM read it.

The tensors of a linear ``[out, in]``, transposed against ours (layout: `calib.checkpoint.quantized.gptq`):

    X.qweight  int32  [in*bits/32, out]      codes, packed along the input channels
    X.qzeros   int32  [groups, out*bits/32]  zero points, packed along the output channels
    X.scales   fp16 or bf16  [groups, out]
    X.g_idx    int32  [in]                   group of every input channel

The first version of the layout, ``gptq``, stores zero points less 1 (modulo 2^bits), ``gptq_v2`` as they are.
All readers have the first one for 4 and 8 bits symmetric; everything else is written in the second one.

``g_idx`` is in order (no method of ours stores another one), but its readers allocate it and take what is in the file.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from calib.model.structure import linear_weight
from ptq.containers.base import Container
from ptq.containers.common import check_tensors, model_problem, plain_integers
from ptq.packing.bits import pack_rows, unpack_rows
from ptq.quantized import QuantizedWeight
from ptq.scheme import KeyValueScheme, Scheme

__all__ = ["GPTQ", "GPTQ_V2", "GptqContainer"]

_BITS = (2, 3, 4, 8)
_FIRST_VERSION_BITS = (4, 8)
_MULTIPLE = 32  # of both sizes, so that every row and column is whole words


class GptqContainer(Container):
    """One version of the layout.

    Args:
        name: the layout's name, ``gptq`` or ``gptq_v2``.
        offset: what is taken off a zero point before it is stored.
    """

    quant_method = "gptq"

    def __init__(self, name: str, offset: int) -> None:
        self.name = name  # type: ignore[misc]
        self._offset = offset

    def unsupported_reason(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        model: nn.Module,
        key_values: KeyValueScheme | None,
    ) -> str | None:
        for name, scheme in schemes.items():
            if scheme is None:
                continue
            linear = linears[name]
            problem = plain_integers(name, scheme, linear, self.quant_method) or self._layout_problem(name, scheme)
            if problem is not None:
                return problem
            rows, columns = linear_weight(linear).shape
            if rows % _MULTIPLE or columns % _MULTIPLE:
                return f"{name} is {rows} x {columns}, and GPTQ takes multiples of {_MULTIPLE}"
        return model_problem(model, key_values)

    def _layout_problem(self, name: str, scheme: Scheme) -> str | None:
        if scheme.bits not in _BITS:
            return f"{name} has {scheme.bits} bits, and GPTQ takes {', '.join(map(str, _BITS))}"
        if self._offset and (not scheme.symmetric or scheme.bits not in _FIRST_VERSION_BITS):
            return f"{name} is {scheme.describe()}, and gptq takes 4 and 8 bits symmetric: gptq_v2 takes it"
        return None

    def layer_tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `Container.layer_tensors`."""
        scheme, (out_features, in_features) = weight.scheme, weight.shape
        groups = scheme.groups(in_features)
        zeros = weight.params.get("zero")
        if zeros is None:
            zeros = torch.full((out_features, groups), 2 ** (scheme.bits - 1), dtype=torch.uint8)
        stored = (zeros.cpu().to(torch.int16) - self._offset).remainder_(2**scheme.bits).to(torch.uint8)
        packed = pack_rows(weight.codes, scheme.bits).cpu()  # [out, words]
        return {
            f"{name}.qweight": packed.T.contiguous(),
            f"{name}.qzeros": pack_rows(stored.T.contiguous(), scheme.bits),
            f"{name}.scales": weight.params["scale"].cpu().T.contiguous(),
            f"{name}.g_idx": scheme.group_index(in_features).to(torch.int32),
        }

    def read_layer(
        self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedWeight:
        """See `Container.read_layer`."""
        out_features, in_features = shape
        bits, groups = scheme.bits, scheme.groups(in_features)
        wanted = {
            "qweight": (in_features * bits // 32, out_features),
            "qzeros": (groups, math.ceil(out_features * bits / 32)),
            "scales": (groups, out_features),
        }
        check_tensors(name, tensors, wanted, f"{scheme.describe()} of {out_features} x {in_features}")
        # clone and not contiguous(): a single word a row counts as contiguous, with strides that are not.
        words = tensors[f"{name}.qweight"].T.clone(memory_format=torch.contiguous_format)
        params = {"scale": tensors[f"{name}.scales"].T.contiguous()}
        if not scheme.symmetric:
            stored = unpack_rows(tensors[f"{name}.qzeros"], bits, out_features).T.contiguous()
            params["zero"] = (stored.to(torch.int16) + self._offset).remainder_(2**bits).to(torch.uint8)
        return QuantizedWeight(unpack_rows(words, bits, in_features), params, scheme)

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        *,
        key_values: KeyValueScheme | None = None,
        others: Iterable[str] = (),
    ) -> dict[str, Any]:
        """See `Container.quantization_config`; the scheme that most linears have, and the others by name."""
        used = Counter(_described(scheme) for scheme in schemes.values() if scheme is not None)
        (bits, group_size, symmetric), _ = used.most_common(1)[0]
        config = {
            "quant_method": self.quant_method,
            "bits": bits,
            "group_size": group_size,
            "sym": symmetric,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"ptq-toolkit:{version('ptq-toolkit')}"]},
        }
        kept = _kept_in_blocks(schemes, linears)
        inside = None if not kept else _common_names(schemes)
        if inside is not None:
            config["modules_in_block_to_quantize"] = [[name] for name in inside]
        dynamic = _dynamic(schemes, kept, (bits, group_size, symmetric))
        return config | ({"dynamic": dynamic} if dynamic else {})

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """``quantize_config.json``, which GPTQModel and older readers look for."""
        return {"quantize_config.json": dict(quantization_config)}

    def config_changes(self, dtype: torch.dtype) -> dict[str, Any]:
        """Readers compute in half precision, and GPTQModel refuses a float32 model."""
        return {"dtype": "float16"} if dtype == torch.float32 else {}


def _described(scheme: Scheme) -> tuple[int, int, bool]:
    return scheme.bits, -1 if scheme.group_size is None else scheme.group_size, scheme.symmetric


def _kept_in_blocks(schemes: Mapping[str, Scheme | None], linears: Mapping[str, nn.Module]) -> list[str]:
    """Linears inside the blocks that stay in full precision."""
    owners = {_split(name)[0] for name in schemes}
    return [name for name in linears if schemes.get(name) is None and _split(name)[0] in owners]


def _split(name: str) -> tuple[str, str]:
    """A linear's full name as its block and its name in the block."""
    found = re.match(r"(.*?\.\d+)\.(.*)", name)
    return (found[1], found[2]) if found else ("", name)


def _common_names(schemes: Mapping[str, Scheme | None]) -> list[str] | None:
    """Names in the block of the quantized linears, if all blocks have the same ones."""
    by_block: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        block, inside = _split(name)
        by_block.setdefault(block, [])
        if scheme is not None:
            by_block[block].append(inside)
    first, *others = by_block.values()
    return first if all(names == first for names in others) else None


def _dynamic(
    schemes: Mapping[str, Scheme | None], kept: Iterable[str], usual: tuple[int, int, bool]
) -> dict[str, dict[str, Any]]:
    """What deviates, by regular expressions of full names: ``-:`` is not quantized, ``+:`` otherwise."""
    found: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in kept}
    for name, scheme in schemes.items():
        if scheme is not None and _described(scheme) != usual:
            bits, group_size, symmetric = _described(scheme)
            found[f"+:^{re.escape(name)}$"] = {"bits": bits, "group_size": group_size, "sym": symmetric}
    return found


GPTQ = GptqContainer("gptq", 1)
GPTQ_V2 = GptqContainer("gptq_v2", 0)
