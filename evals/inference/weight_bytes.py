"""How large a model's weights are in memory."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["weight_bytes"]


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers, shared ones once.

    Buffers are not asked for: packed layers that hold theirs in a kernel's order (`bytes_gone`) would make them again.
    """
    tensors: dict[int, Tensor] = {tensor.data_ptr(): tensor for tensor in model.parameters()}
    gone = 0
    for module in model.modules():
        held = [tensor for tensor in vars(module)["_buffers"].values() if tensor is not None]
        tensors |= {tensor.data_ptr(): tensor for tensor in held}
        gone += getattr(module, "bytes_gone", 0)
    return gone + sum(tensor.nbytes for tensor in tensors.values())
