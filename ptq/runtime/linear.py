"""`QuantLinear`: a linear layer whose weight stays packed in memory; the reference forward."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import OutputError, UsageError
from ptq.quantized import QuantizedWeight
from ptq.runtime.activations import quantize_tokens
from ptq.runtime.dispatch import KERNELS, REFERENCE, Kernel, PackedWeight, choose, dequantized_tiles
from ptq.runtime.input_groups import InputGroups, MergedProduct, is_capturing
from ptq.runtime.replaced_tensors import ReplaceableTensors
from ptq.scheme import SCALE_DTYPES, Rotation, Scheme
from ptq.transforms.hadamard import InputRotation

__all__ = ["QuantLinear"]

INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


class QuantLinear(ReplaceableTensors, nn.Linear):
    """``y = x W^T + bias`` with ``W [out_features, in_features]`` kept as the checkpoint's own tensors.

    The buffers are those of the scheme's number format. The product is computed by the kernel that
    `ptq.runtime.dispatch` chooses; with the reference, every weight has exactly the value of
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
        guard: also keep the empty tensor ``weight`` that the native format stores (see `ptq.containers.native`).
        device: where to allocate the (uninitialised) buffers.
        dtype: of activations; what ``weight.dtype`` tells models that ask a linear for it.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    keeps_stored_tensors = False
    """Whether the checkpoint's tensors stay in memory beside those that a kernel made of them."""

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
        self._scheme = scheme
        self._prepared: tuple[object, PackedWeight] | None = None
        self._chosen: tuple[object, Kernel] | None = None
        self._prepared_by: Kernel | None = None
        self._keeps_both, self._captured = self.keeps_stored_tensors, False
        self._groups: InputGroups | None = None
        self.merged: tuple[MergedProduct, int] | None = None
        # Made at the first forward: here may be a skeleton on meta.
        self._rotations: dict[tuple[Rotation, int], InputRotation] = {}
        specs = scheme.number_format.tensor_specs(out_features, in_features, scheme) | scheme.input_specs(in_features)
        self._stored = tuple(specs)
        for key, (shape, stored) in specs.items():
            self.register_buffer(key, torch.empty(shape, dtype=stored, device=device))
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
        for key, tensor in weight.tensors().items():
            setattr(layer, key, tensor.to(device))
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """An empty tensor with the dtype and device of activations, for models that ask ``linear.weight`` for these."""
        empty = torch.empty(0, dtype=self._activations, device=self._device).as_subclass(_NoDenseWeight)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers: nothing to draw here
        return empty

    @property
    def scheme(self) -> Scheme:
        """How the weight is stored and the input transformed.

        Raises:
            OutputError: the scales have a dtype that no scheme of ours has (a foreign checkpoint with float32 scales).
        """
        if self._gone:
            return self._scheme_in_use
        scale = self._buffers.get("weight_scale")
        if scale is None:
            return self._scheme
        specs = self._scheme.number_format.tensor_specs(self.out_features, self.in_features, self._scheme)
        said = specs["weight_scale"][1]
        if said not in SCALE_DTYPES.values() or (said == scale.dtype and self._scheme.scale_dtype != "auto"):
            return self._scheme
        for name, dtype in SCALE_DTYPES.items():
            if name != "auto" and dtype == scale.dtype:
                return dataclasses.replace(self._scheme, scale_dtype=name)  # type: ignore[arg-type]
        raise OutputError(f"scales of {scale.dtype} have no scheme: float16 or bfloat16 would have one.")

    def quantized(self) -> QuantizedWeight:
        """Codes and the parameters of the number format.

        Raises:
            OutputError: the buffers do not fit each other, see also `scheme`.
        """
        return QuantizedWeight.from_tensors(self._tensors(), self.scheme, (self.out_features, self.in_features))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The stored weight ``[out_features, in_features]`` (for rotated inputs, where they are rotated), computed in
        float32, then cast to ``dtype``."""
        return torch.cat([tile for _, tile in dequantized_tiles(self._packed(), dtype)])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        kernel = self._kernel(x)
        if self._groups is not None and kernel.merging is not None:
            merged = self._groups.product(self, kernel, x)
            if merged is not None:
                return merged
        rotated = not kernel.rotates_input or self._scheme.rounds_input or self._scheme.input_rotation is None
        if rotated:
            x = self._rotated(x)
            x = x if kernel.rounds_input else self._rounded(x)
        weight = self._packed(rotated) if kernel.prepare is None else self._prepared_weight(kernel, rotated)
        return kernel.product(x, weight, self.bias)

    def kernel_name(self, x: Tensor) -> str:
        """The name of the kernel that multiplies inputs of the device and dtype of ``x``: ``fp8`` is native FP8."""
        return self._kernel(x).name

    def _kernel(self, x: Tensor) -> Kernel:
        if torch.is_grad_enabled() and x.requires_grad:  # gradients flow through the reference alone
            return REFERENCE
        asked = (os.environ.get("PTQ_KERNEL", ""), tuple(KERNELS), x.device.type, x.dtype)
        if self._chosen is None or self._chosen[0] != asked:
            kernel = choose(x.device.type, x.dtype, self._scheme, self.out_features, self.in_features)
            if kernel.scale_dtypes and not self._gone:  # a foreign checkpoint can have scales of float32
                scale = self._buffers.get("weight_scale")
                kernel = kernel if scale is None or scale.dtype in kernel.scale_dtypes else REFERENCE
            self._chosen = (asked, kernel)
        return self._chosen[1]

    def share_inputs(self, rotations: dict[tuple[Rotation, int], InputRotation], groups: InputGroups) -> None:
        """Work together with the other linears of a model that read the same tensor one after the other.

        Args:
            rotations: of all of them, made where they are missing: an input is rotated once.
            groups: of all of them: where the kernel can, an input is multiplied once.
        """
        self._rotations, self._groups = rotations, groups

    def weight_to_merge(self, kernel: Kernel) -> PackedWeight | None:
        """What ``kernel`` prepared, if it is all that the layer keeps, and no graph that somebody captured reads it."""
        if not self._gone or self._captured or self._scheme.rounds_input or self._prepared is None:
            return None
        return self._prepared[1] if self._prepared[0] == (kernel.name,) else None

    def join(self, group: MergedProduct, index: int, weight: PackedWeight) -> None:
        """Be a member of a merged product, and multiply by ``weight``, its rows, where that does not."""
        assert self._prepared is not None
        self._prepared, self.merged = (self._prepared[0], weight), (group, index)

    def transform_input(self, x: Tensor) -> Tensor:
        """The input ``[..., in_features]`` as the product sees it: rotated, then rounded, as the scheme says."""
        return self._rounded(self._rotated(x))

    def _rotated(self, x: Tensor) -> Tensor:
        scheme = self._scheme
        if scheme.input_rotation is not None:
            key = scheme.input_rotation, self.in_features
            if key not in self._rotations:
                self._rotations[key] = InputRotation.of(*key)
            x = self._rotations[key].once(x)
        return x

    def _rounded(self, x: Tensor) -> Tensor:
        scheme = self._scheme
        if scheme.activation_format is not None:
            return scheme.activation_format.quantize(x, self._tensors())
        return x if scheme.act_bits is None else quantize_tokens(x, scheme.act_bits, scheme.act_symmetric)

    def __getstate__(self) -> dict[str, Any]:
        """Copies make what kernels need anew."""
        self.restore_tensors()
        return self.__dict__ | {
            "_prepared": None,
            "_chosen": None,
            "merged": None,
            "_captured": False,
            "_prepared_by": None,
        }

    def _tensors(self) -> dict[str, Tensor]:
        """The stored tensors by bare name."""
        buffers = self._buffers
        return {key: buffers[key] for key in self._stored}  # type: ignore[misc]  # none of them is None

    def _packed(self, rotated: bool = True) -> PackedWeight:
        return PackedWeight(self._tensors(), self._scheme, self.out_features, self.in_features, rotated=rotated)

    def _prepared_weight(self, kernel: Kernel, rotated: bool) -> PackedWeight:
        """The weight in the kernel's own order, made at the first use and again where the stored tensors changed."""
        made = self._prepared
        if made is not None and torch.compiler.is_compiling():  # compiled code takes what was made before
            return made[1]
        if made is None or made[0] != self._state(kernel):
            made = self._prepare(kernel, rotated)
        self._captured |= is_capturing()
        return made[1]

    def _state(self, kernel: Kernel) -> tuple[object, ...]:
        """What the prepared weight was made of; where the stored tensors are gone, there is nothing else."""
        if self._gone:
            return (kernel.name,)
        return (kernel.name, *((t.data_ptr(), t._version) for t in self._tensors().values()))

    def _prepare(self, kernel: Kernel, rotated: bool) -> tuple[object, PackedWeight]:
        assert kernel.prepare is not None
        with torch.inference_mode(False), torch.no_grad():
            weight = self._packed()
            weight = dataclasses.replace(weight, prepared=kernel.prepare(weight), rotated=rotated)
            self._prepared = made = (self._state(kernel), weight)
            if kernel.restore is not None and not self._keeps_both:
                self._prepared_by, self._place, self._scheme_in_use = kernel, self._device, self.scheme
                if self.drop_tensors():
                    self._prepared = made = ((kernel.name,), dataclasses.replace(weight, tensors={}))
        return made

    def remade_tensors(self) -> Mapping[str, Tensor]:
        """The stored tensors from the kernel's order."""
        assert self._prepared is not None
        assert self._prepared_by is not None
        assert self._prepared_by.restore is not None
        return self._prepared_by.restore(self._prepared[1])

    def after_restoring(self) -> None:
        """Somebody reads the stored tensors: from now on they stay beside the kernel's, which graphs may read."""
        assert self._prepared is not None
        assert self._prepared_by is not None
        self._keeps_both = True
        self._prepared = (self._state(self._prepared_by), self._prepared[1])
        if self.merged is not None:
            self.merged[0].dissolve()
            self.merged = None

    @property
    def _device(self) -> torch.device:
        return self._place if self._gone else self.get_buffer(self._stored[0]).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # `.to(dtype)` and `.half()` are about activations: stored tensors keep their bits, they only change device.
        stored = {id(tensor) for tensor in self._tensors().values()}

        def keep_stored(tensor: Tensor) -> Tensor:
            if id(tensor) not in stored or not tensor.is_floating_point():
                return fn(tensor)
            return fn(tensor.view(INTEGER_OF_SIZE[tensor.itemsize])).view(tensor.dtype)

        super()._apply(keep_stored, recurse)  # type: ignore[no-untyped-call]
        self._prepared, self._keeps_both = None, self.keeps_stored_tensors
        self._activations = fn(torch.empty(0, dtype=self._activations)).dtype
        return self

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._scheme.describe()}, bias={self.bias is not None}"
