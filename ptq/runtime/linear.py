"""`QuantLinear`: a linear layer whose weight stays packed in memory; the reference forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq.errors import OutputError, UsageError
from ptq.packing.bits import unpack_rows
from ptq.packing.integer import layer_tensors, layer_weight, tensor_specs, unpack_zeros
from ptq.quantized import QuantizedWeight
from ptq.runtime.activations import quantize_tokens
from ptq.scheme import SCALE_DTYPES, Scheme
from ptq.transforms.hadamard import InputRotation

__all__ = ["TILE_WEIGHTS", "QuantLinear"]

TILE_WEIGHTS = 2**22
"""Weights dequantized at a time in `QuantLinear.forward`: at most 28 MB of temporaries (1 byte a code, 4 a float32
value, 2 a half-precision value), while a tile is still large enough for an efficient matrix product."""
INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _NoDenseWeight(Tensor):
    """The empty tensor that `QuantLinear.weight` gives: dtype and device are right, values there are none.

    Whatever fails on it for that reason (merging an adapter adds to it, DoRA takes its norm) fails with a sentence.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs or {})
        except (IndexError, RuntimeError) as error:
            raise UsageError(
                "a packed linear has no dense weight that could be read or changed. Merging an adapter into it, DoRA "
                "and adapters that start from the weight (PiSSA, OLoRA, LoftQ) need one: keep the adapter beside the "
                "packed model, or merge it into the full-precision model and quantize the result."
            ) from error
        empty = isinstance(result, Tensor) and result.shape == (0,)  # a copy or a view of it
        return result.as_subclass(cls) if empty else result


class QuantLinear(nn.Linear):
    """``y = x W^T + bias`` with ``W [out_features, in_features]`` kept as the checkpoint's own tensors.

    The buffers are those of `ptq.packing.integer`. The forward unpacks a tile of output rows, dequantizes it in
    float32, casts it to the dtype of ``x`` and multiplies: every weight has exactly the value of
    ``quantized().dequantize(x.dtype)``. Where the scheme asks for it, ``x`` is first rotated (the stored weight is that
    for rotated inputs), then rounded token by token.

    It is a subclass of ``nn.Linear`` because adapters (peft) and other tools find linears by that class. Gradients flow
    to the input; the weight has none.

    Args:
        in_features: length of an input vector.
        out_features: length of an output vector.
        scheme: how the weight is stored, and what happens to inputs. A checkpoint may carry scales of another dtype;
            the buffer's dtype counts.
        bias: ``[out_features]`` or ``None``.
        guard: also keep the empty tensor ``weight`` that the native format stores (see `ptq.formats.native`).
        device: where to allocate the (uninitialised) buffers.
        dtype: of activations; what ``weight.dtype`` tells models that ask a linear for it.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor | None
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: Tensor | None = None,
        *,
        guard: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which allocates a dense weight
        self.in_features, self.out_features = in_features, out_features
        self._activations = dtype or torch.get_default_dtype()
        self.bits, self.symmetric, self.group_size = scheme.bits, scheme.symmetric, scheme.group_size
        self.act_bits, self.act_symmetric, self.input_rotation = (
            scheme.act_bits,
            scheme.act_symmetric,
            scheme.input_rotation,
        )
        self._rotation: InputRotation | None = None  # made at the first forward: here may be a skeleton on meta
        for key, (shape, stored) in tensor_specs(out_features, in_features, scheme).items():
            self.register_buffer(key, torch.empty(shape, dtype=stored, device=device))
        if scheme.symmetric:
            self.register_buffer("weight_zero_point", None)
        # Stored in the native format under the name of the weight, which a plain linear would look for and refuse.
        self._buffers["weight"] = torch.empty(0, dtype=torch.int8, device=device) if guard else None
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None, *, guard: bool = False) -> QuantLinear:
        """A layer that computes with ``weight``, on its device."""
        out_features, in_features = weight.shape
        device = weight.codes.device
        layer = cls(in_features, out_features, weight.scheme, bias, guard=guard, device=device)
        for key, tensor in layer_tensors("", weight).items():
            setattr(layer, key, tensor.to(device))
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """An empty tensor with the dtype and device of activations, for models that ask ``linear.weight`` for these."""
        empty = torch.empty(0, dtype=self._activations, device=self.weight_scale.device).as_subclass(_NoDenseWeight)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers: nothing to draw here
        return empty

    @property
    def scheme(self) -> Scheme:
        """How the weight is stored and the input transformed.

        Raises:
            OutputError: the scales have a dtype that no scheme of ours has (a foreign checkpoint with float32 scales).
        """
        for name, dtype in SCALE_DTYPES.items():
            if name != "auto" and dtype == self.weight_scale.dtype:
                return Scheme(
                    self.bits,
                    self.symmetric,
                    self.group_size,
                    name,  # type: ignore[arg-type]
                    self.act_bits,
                    self.act_symmetric,
                    self.input_rotation,
                )
        raise OutputError(f"scales of {self.weight_scale.dtype} have no scheme: float16 or bfloat16 would have one.")

    def quantized(self) -> QuantizedWeight:
        """Codes, scales and zero points.

        Raises:
            OutputError: the buffers do not fit each other, see also `scheme`.
        """
        return layer_weight("", dict(self.named_buffers(recurse=False)), self.scheme)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The stored weight ``[out_features, in_features]`` (for rotated inputs, where they are rotated), computed in
        float32, then cast to ``dtype``."""
        return torch.cat([tile for _, tile in self._tiles(dtype)])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        x = self.transform_input(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        parts = [
            functional.linear(x, tile, None if bias is None else bias[rows]) for rows, tile in self._tiles(x.dtype)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def transform_input(self, x: Tensor) -> Tensor:
        """The input ``[..., in_features]`` as the product sees it: rotated, then rounded, as the scheme says."""
        if self.input_rotation is not None:
            if self._rotation is None:
                self._rotation = InputRotation(self.in_features, self.input_rotation)
            x = self._rotation(x)
        return x if self.act_bits is None else quantize_tokens(x, self.act_bits, self.act_symmetric)

    def _tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of output rows with their weights ``[rows, in_features]``."""
        zeros = None
        if self.weight_zero_point is not None:
            zeros = unpack_zeros(self.weight_zero_point, self.bits, self.out_features).float()
        step = max(1, TILE_WEIGHTS // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            weight = unpack_rows(self.weight_packed[rows], self.bits, self.in_features).float()
            _dequantize_(weight, self.weight_scale[rows].float(), self._zero_of(zeros, rows), self.group_size)
            yield rows, weight.to(dtype)

    def _zero_of(self, zeros: Tensor | None, rows: slice) -> Tensor | float:
        return float(2 ** (self.bits - 1)) if zeros is None else zeros[rows]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # `.to(dtype)` and `.half()` are about activations: stored scales keep their bits, they only change device.
        scale = self.weight_scale

        def keep_scale(tensor: Tensor) -> Tensor:
            if tensor is not scale:
                return fn(tensor)
            return fn(tensor.view(INTEGER_OF_SIZE[tensor.itemsize])).view(tensor.dtype)

        super()._apply(keep_scale, recurse)  # type: ignore[no-untyped-call]
        self._activations = fn(torch.empty(0, dtype=self._activations)).dtype
        return self

    def extra_repr(self) -> str:
        group = "per channel" if self.group_size is None else f"group_size={self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, {kind}, {group}, "
            f"bias={self.bias is not None}"
        )
        if self.act_bits is not None:
            text += f", act_bits={self.act_bits}, {'symmetric' if self.act_symmetric else 'asymmetric'} inputs"
        return text if self.input_rotation is None else f"{text}, input_rotation={self.input_rotation}"


def _dequantize_(codes: Tensor, scale: Tensor, zero: Tensor | float, group_size: int | None) -> None:
    """``(code - zero) * scale`` in place, float32 ``[rows, in]``, scales ``[rows, groups]``, any ragged last group."""
    width = codes.shape[1]
    size = width if group_size is None else group_size
    full = width // size * size
    for start, stop, length in ((0, full, size), (full, width, width - full)):
        if stop > start:
            groups = slice(start // size, math.ceil(stop / size))
            part = codes[:, start:stop].view(len(codes), -1, length)  # [rows, groups, length]
            part.sub_(zero if isinstance(zero, float) else zero[:, groups, None]).mul_(scale[:, groups, None])
