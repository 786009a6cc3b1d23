"""Native FP8 products: codes of weights and inputs multiplied by ``torch._scaled_mm``, on GPUs that have them.

The kernel rounds its input itself, to the codes whose values the reference would multiply, so that only the order of
additions (and one rounding of inputs to the activations' dtype) differs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ptq.activation_formats.hardware import SMALLEST_SCALE, quantize_tokens_fp8, quantize_with_fp8
from ptq.grids.floating_point import E4M3
from ptq.runtime.dispatch import Kernel, PackedWeight
from ptq.scheme import Scheme

__all__ = ["FP8_PRODUCTS"]


_ROWWISE_CAPABILITY = (9, 0)
_MULTIPLE = 16


@functools.lru_cache(maxsize=1)
def _missing() -> str | None:
    """Why this machine has no FP8 products."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _ROWWISE_CAPABILITY:
        return f"FP8 products with a scale per row need compute capability 9.0, this GPU has {capability}"
    return None


def unsupported_reason(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why a layer is not multiplied natively."""
    if scheme.act_format not in ("fp8", "fp8-tensor"):
        return "its inputs are not rounded to FP8"
    if out_features % _MULTIPLE or in_features % _MULTIPLE:
        return f"{out_features} x {in_features} are not multiples of {_MULTIPLE}"
    return _missing()


@functools.lru_cache(maxsize=1)
def _quantizer() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The fused kernel where Triton builds it here, else the eager formula, which costs more than the product."""
    try:
        from ptq.runtime.fp8_quantizer import quantize_rows

        fused = functools.partial(quantize_rows, top=E4M3.maximum, smallest=SMALLEST_SCALE)
        fused(torch.zeros(1, _MULTIPLE, device="cuda", dtype=torch.bfloat16))
    except Exception as error:  # Triton's compiler, the C compiler it calls and the driver raise what they like
        warnings.warn(f"inputs are quantized to FP8 without Triton, which is slower: {error}", stacklevel=2)
        return quantize_tokens_fp8
    return fused


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``[..., in]`` before rounding to ``[..., out]``, both bfloat16."""
    rows = x.reshape(-1, x.shape[-1])
    if weight.scheme.act_format == "fp8":
        codes, scale = _quantizer()(rows)
    else:
        codes, scale = quantize_with_fp8(rows, weight.tensors["input_scale"])
    columns = weight.tensors["weight_scale"].float().reshape(1, -1).expand(1, weight.out_features)
    result = torch._scaled_mm(
        codes,
        weight.tensors["weight_packed"].t(),
        scale_a=scale.contiguous(),
        scale_b=columns.contiguous(),
        bias=None if bias is None else bias.to(x.dtype),
        out_dtype=x.dtype,
    )
    return result.view(*x.shape[:-1], weight.out_features)


FP8_PRODUCTS = Kernel(
    "fp8",
    frozenset({"cuda"}),
    frozenset({torch.bfloat16}),
    frozenset({"fp8", "fp8-tensor"}),
    unsupported_reason,
    product,
    rounds_input=True,
    multiplies="native FP8, torch._scaled_mm",
)
