"""What a pass shows of a block: which modules read the output of which norm, and what kind of norm it is.

Nothing is known of model classes. A norm is a module with a vector ``weight`` that scales its output; its readers are
the modules that are called with its output, the same memory. A reader's ``weight`` is a matrix (a linear, a router), or
it is an `ExpertList`, whose experts read what it is called with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from calib.model.block_inputs import first_tensor
from calib.model.experts import ExpertList, expert_lists
from calib.model.input_groups import first_argument
from calib.model.structure import foreign_code

__all__ = ["Call", "Norm", "Trace", "expert_readers", "hooked", "norm_offset", "trace", "with_values"]


@dataclasses.dataclass(frozen=True)
class Call:
    """The first call of a module in one pass: its first tensor argument, its first output, how often it was called."""

    input: Tensor
    output: Tensor
    calls: int = 1


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm with a gain for every channel.

    Args:
        name: of the module.
        offset: its gain is ``weight + offset`` (one in Gemma, else zero).
        bias: it adds a vector ``bias``; centers: it subtracts the mean.
        readers: names of the modules that are called with its output, in the order of their calls.
    """

    name: str
    offset: float
    bias: bool
    centers: bool
    readers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Trace:
    """One pass: the calls of all modules that were watched, in the order of their first call, and the norms."""

    calls: dict[str, Call]
    norms: dict[str, Norm]


def trace(root: nn.Module, run: Callable[[], object], skip: Collection[str] = ()) -> Trace:
    """Watch the norms, the modules with a matrix, and the lists of experts (not the experts in them) for one pass.

    Args:
        root: with its weights, in float32; run: one pass through it.
        skip: names of parts to leave alone.

    Raises:
        ModelError: the pass fails.
    """
    outside = tuple(f"{name}." for name in (*expert_lists(root), *skip))
    watched = {
        name: module
        for name, module in root.named_modules()
        if _watched(module) and name not in skip and not name.startswith(outside)
    }
    calls: dict[str, Call] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if name in calls:
            calls[name] = dataclasses.replace(calls[name], calls=calls[name].calls + 1)
        elif isinstance(first := first_tensor(output), Tensor) and _has_tensor(args, kwargs):
            calls[name] = Call(first_argument(args, kwargs).detach(), first.detach())

    with hooked({module: name for name, module in watched.items()}, note), foreign_code(_problem(root)):
        run()
    norms = {}
    for name, call in calls.items():
        offset = norm_offset(watched[name], call.input)
        if offset is not None:
            readers = [n for n, other in calls.items() if n != name and _same_memory(other.input, call.output)]
            bias = isinstance(getattr(watched[name], "bias", None), Tensor)
            norms[name] = Norm(name, offset, bias, _centers(watched[name], call), tuple(readers))
    return Trace(calls, norms)


def _has_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))


def _problem(root: nn.Module) -> str:
    return f"{type(root).__name__} cannot be run by itself"


def _watched(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if isinstance(module, ExpertList) or (weight is not None and weight.ndim in (1, 2)):
        return True
    return any(parameter is not None and parameter.ndim >= 3 for parameter in module._parameters.values())


@contextlib.contextmanager
def hooked(
    modules: dict[nn.Module, str], note: Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]
) -> Iterator[None]:
    """Inside, ``note(name, args, kwargs, output)`` is told of every call; what it returns replaces the output."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return note(modules[module], args, kwargs, output)

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that are both alive are the same numbers, perhaps in another shape."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.numel() > 0


def norm_offset(module: nn.Module, x: Tensor) -> float | None:
    """What a norm adds to its ``weight`` to get its gain, seen by giving it other weights; ``None`` for other modules.

    Args:
        module: a module; x: an input of it.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    known = set(module._parameters) <= {"weight", "bias"} and not module._buffers and not list(module.children())
    if weight is None or weight.ndim != 1 or not known or x.shape[-1] != len(weight):
        return None
    silent = torch.zeros_like(weight) if bias is None else bias
    for offset in (0.0, 1.0):
        try:
            with torch.no_grad(), with_values(module, {"weight": torch.full_like(weight, -offset)}):
                output = module(x)
        except (RuntimeError, TypeError, ValueError):
            return None
        if isinstance(output, Tensor) and torch.allclose(output, silent.to(output).expand_as(output), atol=1e-6):
            return offset
    return None


def _centers(norm: nn.Module, call: Call) -> bool:
    """Whether a constant added to all channels leaves the norm's output as it is."""
    size = call.input.abs().mean().clamp(min=1e-6)
    with torch.no_grad():
        moved: Tensor = norm(call.input + size)
    return bool((moved - call.output).norm() < 1e-2 * call.output.norm().clamp(min=1e-30))


@contextlib.contextmanager
def with_values(root: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Inside, these parameters have other values (``root`` is unchanged afterwards).

    Args:
        root: a module; values: by parameter name in it.
    """
    places = [(root.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in values]
    before = [module._parameters[leaf] for module, leaf in places]
    try:
        for (module, leaf), value in zip(places, values.values(), strict=True):
            module._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=False)
        yield
    finally:
        for (module, leaf), parameter in zip(places, before, strict=True):
            module._parameters[leaf] = parameter


def expert_readers(experts: ExpertList) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The linears of an expert that read what it is called with, and those that give what it returns."""
    expert = experts[0]
    linears = {name: module for name, module in expert.named_children() if isinstance(module, nn.Linear)}
    width = next(iter(linears.values())).in_features
    example = next(iter(linears.values())).weight
    rows = torch.zeros(1, width, dtype=example.dtype, device=example.device)
    calls: dict[str, Call] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name] = Call(first_argument(args, kwargs), output)

    with hooked({module: name for name, module in linears.items()}, note), torch.no_grad():
        result = expert(rows)
    readers = tuple(name for name, call in calls.items() if _same_memory(call.input, rows))
    return readers, tuple(name for name, call in calls.items() if _same_memory(call.output, result))
