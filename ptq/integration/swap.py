"""Replace linears of a model skeleton by packed ones, before its weights are loaded."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from calib.model.structure import tied_head
from ptq.errors import OutputError
from ptq.runtime.embedding import QuantEmbedding, TiedHead
from ptq.runtime.input_groups import InputGroups
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Rotation, Scheme
from ptq.transforms.hadamard import InputRotation

__all__ = ["linear_shape", "share_inputs", "swap_linear"]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out_features, in_features)`` of a ``torch.nn.Linear`` or transformers' ``Conv1D``, ``None`` for others."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


def swap_linear(model: nn.Module, name: str, scheme: Scheme, *, guard: bool) -> None:
    """Put a `QuantLinear` in the place of linear ``name``: same shape, same bias parameter, same device, no weight.

    Raises:
        OutputError: the model has no linear of that name, so that the checkpoint's config does not fit its model.
    """
    parent_name, _, child = name.rpartition(".")
    try:
        parent, old = model.get_submodule(parent_name), model.get_submodule(name)
    except AttributeError as error:
        raise OutputError(
            f"the checkpoint's config says that {name} is packed, but {type(model).__name__} has no such module."
        ) from error
    if isinstance(old, nn.Embedding):
        _swap_embedding(model, parent, child, old, scheme, guard=guard)
        return
    shape = linear_shape(old)
    if shape is None:
        raise OutputError(f"the checkpoint's config says that {name} is packed, but it is a {type(old).__name__}.")
    parameters = dict(old.named_parameters(recurse=False))
    device, dtype = parameters["weight"].device, parameters["weight"].dtype
    new = QuantLinear(shape[1], shape[0], scheme, parameters.get("bias"), guard=guard, device=device, dtype=dtype)
    setattr(parent, child, new.train(old.training))


def _swap_embedding(
    model: nn.Module, parent: nn.Module, child: str, old: nn.Embedding, scheme: Scheme, *, guard: bool
) -> None:
    """Put a `QuantEmbedding` in the place of the embedding, and a `TiedHead` in that of its tied head."""
    tied = tied_head(model) if hasattr(model, "get_output_embeddings") else None
    weight = old.weight
    new = QuantEmbedding(
        old.num_embeddings, old.embedding_dim, scheme, guard=guard, device=weight.device, dtype=weight.dtype
    )
    setattr(parent, child, new.train(old.training))
    if tied is None:
        return
    owner, _, name = tied.rpartition(".")
    head = model.get_submodule(tied)
    bias = dict(head.named_parameters(recurse=False)).get("bias")
    setattr(model.get_submodule(owner), name, TiedHead(new, bias).train(head.training))
    for part in model.modules():  # transformers would tie weights that are not there
        for key in ("all_tied_weights_keys", "_tied_weights_keys"):
            pairs = getattr(part, key, None)
            if isinstance(pairs, dict):
                kept = {target: source for target, source in pairs.items() if not f"{target}".startswith(f"{name}.")}
                setattr(part, key, kept)


def share_inputs(model: nn.Module) -> None:
    """Let the packed linears of a model that read the same input (q, k and v; gate and up) rotate it once, and multiply
    it once where their kernel can."""
    rotations: dict[tuple[Rotation, int], InputRotation] = {}
    groups = InputGroups()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.share_inputs(rotations, groups)
