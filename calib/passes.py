"""Single passes through one block: placing it, running it up to a group, recording inputs, checking outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from calib.block_calls import BlockCall
from calib.errors import NumericalError
from calib.model_map import InputGroup
from calib.precision import has_fast_bfloat16

__all__ = ["check_finite", "pass_dtype", "place", "recording", "run_to"]


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


class _Reached(Exception):
    """The input that was asked for is there."""


def run_to(block: nn.Module, group: InputGroup, call: BlockCall, hidden: Tensor) -> Tensor:
    """The group's input: the pass through the block stops there (or collects, if the group is called several times)."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(_three_dims(args[0], hidden))
        if group.calls == 1:
            raise _Reached

    handle = block.get_submodule(group.linears[0]).register_forward_pre_hook(hook)
    with contextlib.suppress(_Reached):
        try:
            call(block, hidden)
        finally:
            handle.remove()
    return found[0] if len(found) == 1 else torch.cat([part.reshape(1, -1, part.shape[-1]) for part in found], dim=1)


def _three_dims(inputs: Tensor, hidden: Tensor) -> Tensor:
    """``[sequences, tokens, n]``, also where a block flattens its tokens or routes only some of them here."""
    if inputs.ndim == 3:
        return inputs
    if inputs[..., 0].numel() == hidden[..., 0].numel():
        return inputs.reshape(*hidden.shape[:2], -1)
    return inputs.reshape(1, -1, inputs.shape[-1])


@contextlib.contextmanager
def recording(block: nn.Module, captured: dict[InputGroup, list[Tensor]], hidden: Tensor) -> Iterator[None]:
    """Append every group's input in the pass made inside the context."""
    handles = []
    for group, store in captured.items():

        def note(_: nn.Module, args: tuple[Tensor, ...], store: list[Tensor] = store) -> None:
            store.append(_three_dims(args[0].detach(), hidden))

        handles.append(block.get_submodule(group.linears[0]).register_forward_pre_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Parameters to ``dtype`` and ``device``; buffers keep their dtype (rotary frequencies must stay float32)."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                wanted = dtype if parameter.is_floating_point() else parameter.dtype
                part._parameters[name] = nn.Parameter(parameter.detach().to(device, wanted), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)


def check_finite(hidden: Tensor, name: str) -> None:
    if not bool(torch.isfinite(hidden.sum(dtype=torch.float32))):
        bad = (~torch.isfinite(hidden)).float().mean().item()
        raise NumericalError(
            f"the outputs of {name} hold NaN or Inf ({bad:.2%} of the entries). Try --dtype float32; if that does not "
            f"help the checkpoint is damaged."
        )
