"""Around a pass through one block: its dtype, placing the block, the shape of inputs, checking outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib.errors import NumericalError
from calib.precision import has_fast_bfloat16, share_not_finite

__all__ = ["MAX_WEIGHT", "check_finite", "check_range", "check_weight", "move_to", "pass_dtype", "three_dims"]

MAX_WEIGHT = 1e12
"""Largest weight that is quantized. Powers of errors up to the 2.4th, summed over a row, stay within float32 below it;
real models have weights below 1e4."""


def pass_dtype(asked: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of the passes through blocks: what was asked, or for ``auto`` bfloat16 where the checkpoint is in half
    precision and the device multiplies bfloat16 natively, else float32 (float16 stays float16 on a GPU)."""
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]
    if stored == torch.float16 and device.type == "cuda":
        return torch.float16
    if stored == torch.bfloat16 and has_fast_bfloat16(device):
        return torch.bfloat16
    return torch.float32


def three_dims(inputs: Tensor, shape: tuple[int, int]) -> Tensor:
    """``[sequences, tokens, n]``, also where a block flattens its tokens or routes only some of them here.

    Args:
        inputs: of a linear; shape: sequences and tokens of the batch.
    """
    if inputs.ndim == 3:
        return inputs
    if inputs[..., 0].numel() == shape[0] * shape[1]:
        return inputs.reshape(*shape, -1)
    return inputs.reshape(1, -1, inputs.shape[-1])


def move_to(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Parameters to ``dtype`` and ``device``; buffers keep their dtype (rotary frequencies must stay float32)."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                wanted = dtype if parameter.is_floating_point() else parameter.dtype
                part._parameters[name] = nn.Parameter(parameter.detach().to(device, wanted), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse a weight with NaN or Inf in it.

    Raises:
        NumericalError: names it, and the fraction.
    """
    bad = share_not_finite(weight) if weight.is_floating_point() else None
    if bad:  # a sum can overflow where no entry does
        raise NumericalError(
            f"{name}: {100 * bad:.3g}% of the weights are NaN or Inf. The checkpoint is damaged, or was saved in a "
            f"dtype it overflows."
        )


def check_range(weight: Tensor, name: str) -> None:
    """Refuse a weight that is to be quantized if it holds NaN or Inf, or numbers beyond `MAX_WEIGHT`.

    Raises:
        NumericalError: names it, the largest number and the limit.
    """
    check_weight(weight, name)
    largest = max(abs(float(edge)) for edge in weight.aminmax()) if weight.numel() else 0.0
    if largest > MAX_WEIGHT:
        raise NumericalError(
            f"{name}: the largest weight is {largest:.3g}, and up to {MAX_WEIGHT:g} are quantized: the squared errors "
            f"of larger ones overflow float32. Is the checkpoint damaged? If not, leave the layer out: --ignore {name}."
        )


def check_finite(hidden: Tensor, name: str) -> None:
    bad = share_not_finite(hidden)
    if bad is not None:
        raise NumericalError(
            f"the outputs of {name} hold NaN or Inf ({bad:.2%} of the entries). Try --dtype float32; if that does not "
            f"help the checkpoint is damaged."
        )
