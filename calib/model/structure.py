"""The map of a model: its repeated blocks and their linears. What shares an input is traced in
`calib.model.input_groups`.

Nothing is known of model classes. Blocks are the children of the largest module list that is not inside another; of a
multimodal model, the largest one in its language model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from calib.errors import ModelError
from calib.model.model_class import language_model, other_modalities

__all__ = [
    "all_linears",
    "end_modules",
    "find_blocks",
    "find_linears",
    "foreign_code",
    "fused_experts",
    "is_linear",
    "linear_weight",
    "set_linear_weight",
    "tied_head",
]


def is_linear(module: nn.Module) -> bool:
    """``y = x W^T + b`` with a weight parameter: `nn.Linear`, or `Conv1D` of GPT-2 with its transposed weight."""
    return isinstance(module, nn.Linear | Conv1D) and isinstance(module.weight, Tensor) and _computes_linear(module)


def all_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of a model by full name, also those that cannot be quantized: a format lists them as dense."""
    return {name: one for name, one in model.named_modules() if is_linear(one) or isinstance(one, nn.Linear)}


def _computes_linear(module: nn.Module) -> bool:
    """Whether a subclass with a forward of its own still gives ``x W^T + b``: asked of a copy with a small weight."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight, x = torch.arange(15.0).view(3, 5).sin(), torch.arange(10.0).view(1, 2, 5).cos()
    bias = None if module.bias is None else torch.ones(3)
    probe = copy.copy(module)
    stored = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    parameters = {"weight": nn.Parameter(stored), "bias": None if bias is None else nn.Parameter(bias)}
    probe.__dict__["_parameters"] = parameters
    probe.__dict__.update(in_features=5, out_features=3, nf=3)
    try:
        with torch.no_grad(), torch.device("cpu"):
            return torch.allclose(probe(x), nn.functional.linear(x, weight, bias), atol=1e-5)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return False


def linear_weight(module: nn.Module) -> Tensor:
    """The weight as ``[out, in]`` (a view)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def set_linear_weight(module: nn.Module, weight: Tensor) -> None:
    """Give the module the weight ``[out, in]`` (no copy)."""
    stored = weight.T if isinstance(module, Conv1D) else weight
    module._parameters["weight"] = nn.Parameter(stored, requires_grad=False)


def fused_experts(model: nn.Module) -> list[str]:
    """Names of parameters that hold the weights of several experts in one three-dimensional tensor."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
    ]


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the repeated decoder blocks, in order.

    Raises:
        ModelError: the model has no list of modules with parameters.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    outer = _of_language(model, outer)
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in outer]
    if not sizes or max(sizes) == 0:
        raise ModelError(f"{type(model).__name__} has no list of repeated blocks; ptq quantizes decoder-only models.")
    name, module = outer[sizes.index(max(sizes))]
    owners = [id(p) for block in module for p in set(block.parameters())]
    if any(hasattr(part, "_rescale_layers") for part in model.modules()):
        raise ModelError(
            f"{type(model).__name__} changes its weights in place while it runs, which packed weights cannot follow: "
            f"ptq does not quantize it."
        )
    if len(owners) != len(set(owners)):
        raise ModelError(
            f"blocks of {type(model).__name__} share parameters with each other: ptq cannot walk through it."
        )
    return [f"{name}.{index}" for index in range(len(module))]


def _of_language(model: nn.Module, lists: list[tuple[str, nn.ModuleList]]) -> list[tuple[str, nn.ModuleList]]:
    """Those of the lists that belong to the language model, if the model says which they are; all of them if not."""
    others = tuple(f"{name}." for name in other_modalities(model))
    text = [(name, module) for name, module in lists if not name.startswith(others)] or lists
    inside = set(language_model(model).modules())
    return [(name, module) for name, module in text if module in inside] or text


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Linears of a block by their name in it."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def end_modules(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the head, as the model names them."""
    return model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]


def tied_head(model: nn.Module) -> str | None:
    """The full name of a head whose weight is the embedding's; ``None`` where it has one of its own."""
    embedding, head = end_modules(model)
    if embedding is None or head is None:
        return None
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if head.weight is not embedding.weight and not getattr(config, "tie_word_embeddings", False):
        return None
    return next(str(name) for name, module in model.named_modules() if module is head)


@contextlib.contextmanager
def foreign_code(problem: str) -> Iterator[None]:
    """Turn what modelling code that is not ours raises when it is run in an unexpected way into a `ModelError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ModelError(f"{problem}: {type(error).__name__}: {error}") from error
