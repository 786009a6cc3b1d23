"""How a model's tensors lie in the residual stream: what reads it through a norm, what writes to it.

Found for one block of every kind by running it on a few tokens:

* A norm reads the stream if a very large constant added to the stream is what the norm is called with.
* A linear (or a list of experts) writes to the stream if a very large constant added to its output is what the block
  returns: later norms bound everything else that the constant changes.

The result is a `Part` a tensor. That the parts are right is then tried: `ptq.transforms.rotation.residual` rotates the
block and compares outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from calib.errors import ModelError
from calib.model.block_inputs import first_tensor
from calib.model.experts import ExpertList
from calib.model.structure import foreign_code
from ptq.transforms.tracing import Norm, Trace, expert_readers, hooked, trace

__all__ = ["Part", "block_parts", "cannot_rotate", "outside_parts"]

Kind = Literal["read", "read bias", "write", "gain", "shift"]
_LARGE = 1e5  # times the stream's size
_ALIGNED = 0.999  # cosine of an answer to the constant and the constant


@dataclasses.dataclass(frozen=True)
class Part:
    """What one tensor is to the residual stream.

    Args:
        kind: ``read``: a dimension is multiplied with the normed stream; ``write``: it is added to the stream;
            ``gain`` and ``shift``: a norm's vectors; ``read bias``: of a reader.
        axis: the tensor's dimension that lies in the stream, for ``read`` and ``write``.
        norm: the norm's name, for all but ``write``; offset: its gain is ``weight + offset``; bias: it has a bias.
        folds: the norm's bias moves into the readers' (all have one).
        weight: for ``read bias``, the name of the weight beside it.
        centers: the norm subtracts the mean.
    """

    kind: Kind
    axis: int = -1
    norm: str = ""
    offset: float = 0.0
    bias: bool = False
    folds: bool = False
    weight: str = ""
    centers: bool = False

    def inside(self, prefix: str) -> Part:
        """The same with names below ``prefix``."""
        norm, weight = (f"{prefix}.{name}" if name else "" for name in (self.norm, self.weight))
        return dataclasses.replace(self, norm=norm, weight=weight)


def cannot_rotate(reason: str) -> ModelError:
    """The refusal of a model whose residual stream cannot be rotated."""
    return ModelError(
        f"{reason}: the residual stream of this model cannot be rotated. Leave out the rotation 'residual'."
    )


def block_parts(block: nn.Module, call: Callable[[Tensor], Tensor], hidden: Tensor, where: str) -> dict[str, Part]:
    """The parts of a block's tensors by their names in it; tensors that are no part of the stream are left out.

    Args:
        block: with its weights in float32.
        call: hidden states ``[sequences, tokens, width]`` -> the block's output.
        hidden: what enters the block; where: the block's name, for messages.

    Raises:
        ModelError: the block has a part that a rotation of the stream cannot pass, and which.
    """
    width = hidden.shape[-1]
    found = trace(block, lambda: call(hidden))
    _refuse_fused(block, found, where)
    push = _push(hidden)
    pushed = trace(block, lambda: call(hidden + push))
    readers = {
        name: norm
        for name, norm in found.norms.items()
        if found.calls[name].input.shape[-1] == width
        and name in pushed.calls
        and _follows(pushed.calls[name].input, push)
    }
    # A linear that reads the stream gives no vector of it; a list of experts does both.
    read = {n for norm in readers.values() for n in norm.readers if not isinstance(block.get_submodule(n), ExpertList)}
    with foreign_code(f"{where} cannot be run by itself"):
        ends = [name for name in found.calls if name not in read and _writes(block, name, call, hidden, push)]
    post = [name for name in ends if name in found.norms]
    if post:
        raise cannot_rotate(
            f"{where}.{post[0]} is a norm on what its block adds to the hidden state, and its gains cannot be moved "
            f"into other weights"
        )
    parts: dict[str, Part] = {}
    for norm in readers.values():
        parts |= _norm_parts(block, norm, where)
    for name in ends:
        parts |= _write_parts(block, name)
    return parts


def outside_parts(model: nn.Module, found: Trace, head: str, embeddings: list[str]) -> dict[str, Part]:
    """The parts of what lies outside the blocks: embeddings write, the head reads the final norm.

    Args:
        model: the whole one; found: a trace of it without the blocks; head: name of the output layer.
        embeddings: names of the embeddings that are added up to the stream.

    Raises:
        ModelError: the head does not read the output of a norm.
    """
    final = [norm for norm in found.norms.values() if head in norm.readers]
    if not final:
        raise cannot_rotate(f"{head} does not read the output of a norm with a gain for every channel")
    parts = {f"{name}.weight": Part("write", -1) for name in embeddings}
    return parts | _norm_parts(model, final[0], type(model).__name__)


def _refuse_fused(block: nn.Module, found: Trace, where: str) -> None:
    for name in found.calls:
        for leaf, parameter in block.get_submodule(name)._parameters.items():
            convolution = isinstance(block.get_submodule(name), nn.Conv1d)  # judged by the trial
            if parameter is not None and parameter.ndim >= 3 and not convolution:
                raise cannot_rotate(
                    f"{where}.{name}.{leaf} has {parameter.ndim} dimensions: fused experts that cannot be taken apart"
                )


def _push(hidden: Tensor) -> Tensor:
    """A very large vector ``[width]`` with no mean, so that a norm that subtracts it sees all of it."""
    push = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(hidden)
    push = push - push.mean()
    return push * (_LARGE * hidden.float().square().mean().sqrt().clamp(min=1e-3))


def _follows(answer: Tensor, push: Tensor) -> bool:
    """Whether every row of an answer points where the push does."""
    rows = answer.reshape(-1, answer.shape[-1])
    return bool((torch.cosine_similarity(rows, push[None]).abs() > _ALIGNED).all())


def _writes(block: nn.Module, name: str, call: Callable[[Tensor], Tensor], hidden: Tensor, push: Tensor) -> bool:
    """Whether a constant added to a module's output leaves the block as it is, up to a factor."""
    module = block.get_submodule(name)

    def note(_: str, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, Tensor) or output.shape[-1] != len(push):
            raise _OtherWidth
        return output + push.to(output)

    try:
        with hooked({module: name}, note):
            return _follows(first_tensor(call(hidden)), push)
    except _OtherWidth:
        return False


class _OtherWidth(Exception):
    """The module's output is no vector of the stream."""


def _norm_parts(root: nn.Module, norm: Norm, where: str) -> dict[str, Part]:
    """The parts of a norm and of everything that reads it."""
    reads: dict[str, Part] = {}
    biases: list[bool] = []
    for name in norm.readers:
        for linear in _reading_linears(root, name):
            module = root.get_submodule(linear)
            axis = 0 if isinstance(module, Conv1D) else -1
            reads[f"{linear}.weight"] = Part("read", axis)
            biases.append(module._parameters.get("bias") is not None)
            if biases[-1]:
                reads[f"{linear}.bias"] = Part("read bias", axis, weight=f"{linear}.weight")
    if not reads:
        raise cannot_rotate(
            f"{where}: nothing that ptq knows of reads the norm {norm.name}, so that its gains have no place to go"
        )
    own: dict[str, Part] = {f"{norm.name}.weight": Part("gain")}
    if norm.bias:
        own[f"{norm.name}.bias"] = Part("shift")
    about: dict[str, Any] = {"norm": norm.name, "offset": norm.offset, "bias": norm.bias, "centers": norm.centers}
    about["folds"] = all(biases)
    return {name: dataclasses.replace(part, **about) for name, part in (reads | own).items()}


def _reading_linears(root: nn.Module, name: str) -> list[str]:
    module = root.get_submodule(name)
    if isinstance(module, ExpertList):
        readers, _ = expert_readers(module)
        return [f"{name}.{index}.{linear}" for index in range(module.num_experts) for linear in readers]
    weight = module._parameters.get("weight")
    return [name] if weight is not None and weight.ndim == 2 else []


def _write_parts(root: nn.Module, name: str) -> dict[str, Part]:
    module = root.get_submodule(name)
    linears = [name]
    if isinstance(module, ExpertList):
        _, writers = expert_readers(module)
        linears = [f"{name}.{index}.{linear}" for index in range(module.num_experts) for linear in writers]
    parts = {}
    for linear in linears:
        part: Any = root.get_submodule(linear)
        parts[f"{linear}.weight"] = Part("write", -1 if isinstance(part, Conv1D) else 0)
        if part._parameters.get("bias") is not None:
            parts[f"{linear}.bias"] = Part("write", 0)
    return parts
