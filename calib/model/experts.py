"""Mixtures of experts as plain linears.

transformers keeps the experts of a layer in one module with three-dimensional parameters, for example ``gate_up_proj
[experts, 2 I, H]`` and ``down_proj [experts, H, I]``. Quantization works on linears. `ExpertList` computes the same
with one small module an expert:

    experts.3.gate_proj.weight  [I, H]      = gate_up_proj[3, :I]     (a view, no copy)
    experts.3.up_proj.weight    [I, H]      = gate_up_proj[3, I:]
    experts.3.down_proj.weight  [H, I]      = down_proj[3]

A fused module is replaced only if it declares its layout (transformers' ``use_experts_implementation``), has the
parameters of that layout and nothing else, and a small copy of it with random weights computes the same before and
after. Anything else stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib.model.expert_probe import PROBE_EXPERTS, Accumulation, find_accumulation

__all__ = [
    "Expert",
    "ExpertLayout",
    "ExpertList",
    "expert_linears",
    "expert_lists",
    "fill_experts",
    "fused_in_place",
    "join_experts",
    "split_experts",
]

PROBE_INNER, PROBE_WIDTH = 5, 8
"""Inner width and width of the copy that is tried: different, so that a wrong layout cannot fit."""


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
    """How a fused module stores its experts, in the words of ``use_experts_implementation``.

    Args:
        has_gate: ``gate_up_proj`` holds two matrices, else ``up_proj`` one.
        has_bias: every parameter ``x`` has an ``x_bias`` ``[experts, out]``.
        is_transposed: matrices are ``[in, out]``.
        is_concatenated: gate first, then up; else their rows alternate.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool

    @property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """The fused parameters, and the linears that each is cut into."""
        first = {"gate_up_proj": ("gate_proj", "up_proj")} if self.has_gate else {"up_proj": ("up_proj",)}
        weights: dict[str, tuple[str, ...]] = {**first, "down_proj": ("down_proj",)}
        return weights | ({f"{name}_bias": linears for name, linears in weights.items()} if self.has_bias else {})

    def rows(self, parameter: str, linear: str, tensor: Tensor) -> Tensor:
        """The view of one expert's ``tensor`` that belongs to ``linear``: ``[out, in]``, or ``[out]`` of a bias."""
        whole = tensor.T if self.is_transposed and tensor.ndim == 2 else tensor
        count, position = len(self.parameters[parameter]), self.parameters[parameter].index(linear)
        if count == 1:
            return whole
        return whole.chunk(count)[position] if self.is_concatenated else whole[position::count]


class Expert(nn.Module):
    """One expert: ``down(gating(gate(x), up(x)))`` with the gating of the fused module it comes from.

    Args:
        fused: the fused module; layout: how it stores its experts.
    """

    _gating: Callable[[Tensor], Tensor]
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, fused: Any, layout: ExpertLayout) -> None:
        super().__init__()
        self.layout = layout
        # Not by `self.x = `: an activation that is a module must not become a submodule of every expert.
        object.__setattr__(self, "_gating", fused._apply_gate if layout.has_gate else fused.act_fn)
        for parameter, linears in layout.parameters.items():
            if not parameter.endswith("_bias"):
                for linear in linears:
                    weight = layout.rows(parameter, linear, fused.get_parameter(parameter)[0])
                    self.add_module(linear, _empty_linear(weight, layout.has_bias))

    def forward(self, rows: Tensor) -> Tensor:
        """Output ``[t, H]`` for the tokens ``rows`` ``[t, H]`` that were routed here, before the routing weights."""
        if not self.layout.has_gate:
            inner = self._gating(self.up_proj(rows))
        else:
            parts = [self.gate_proj(rows), self.up_proj(rows)]  # 2 x [t, I]
            joined = torch.cat(parts, -1) if self.layout.is_concatenated else torch.stack(parts, -1).flatten(-2)
            inner = self._gating(joined)
        output: Tensor = self.down_proj(inner)
        return output


def _empty_linear(like: Tensor, bias: bool) -> nn.Linear:
    """A linear with a weight like ``like`` on the meta device, made without drawing it: there are tens of thousands."""
    out_features, in_features = like.shape
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = in_features, out_features
    linear.weight = nn.Parameter(torch.empty(like.shape, dtype=like.dtype, device="meta"), False)
    empty = nn.Parameter(torch.empty(out_features, dtype=like.dtype, device="meta"), False) if bias else None
    linear.register_parameter("bias", empty)
    return linear


class ExpertList(nn.Module):
    """The experts of one layer: children ``"0"``, ``"1"``, ... in the place of a fused module.

    Args:
        fused: the module to replace; kept aside (no submodule), with its parameters on the meta device.
        layout: how it stores its experts.
        accumulation: dtype in which the outputs of a token's experts are added up: that of the hidden state, of the
            routing weights, or float32.
    """

    fused: nn.Module

    def __init__(self, fused: nn.Module, layout: ExpertLayout, accumulation: Accumulation = "hidden") -> None:
        super().__init__()
        object.__setattr__(self, "fused", fused)
        self.layout, self.accumulation = layout, accumulation
        self.num_experts = int(fused.num_experts)  # type: ignore[arg-type]
        for index in range(self.num_experts):
            self.add_module(str(index), Expert(fused, layout))

    def __getitem__(self, index: int) -> Expert:
        expert = self._modules[str(index)]
        assert isinstance(expert, Expert)
        return expert

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of every token's experts, ``[T, H]``.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: experts of every token, ``[T, k]``; the number of experts stands for "none".
            top_k_weights: ``[T, k]``.
        """
        dtypes = {"hidden": hidden_states.dtype, "weights": top_k_weights.dtype, "float32": torch.float32}
        dtype = dtypes[self.accumulation]
        total = torch.zeros_like(hidden_states, dtype=dtype)
        for index in torch.unique(top_k_index).tolist():
            if index < self.num_experts:
                position, token = torch.where(torch.eq(top_k_index.T, index))
                output = self[index](hidden_states[token]) * top_k_weights[token, position, None]  # [t, H]
                total.index_add_(0, token, output.to(dtype))
        return total.to(hidden_states.dtype)

    def names(self, parameter: str) -> list[str]:
        """What a fused parameter is cut into: ``0.gate_proj.weight``, ``0.up_proj.weight``, ``1.gate_proj.weight``"""
        kind = "bias" if parameter.endswith("_bias") else "weight"
        linears = self.layout.parameters[parameter]
        return [f"{index}.{linear}.{kind}" for index in range(self.num_experts) for linear in linears]

    def views(self, parameter: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parts of a fused parameter ``[experts, ...]`` with their `names`, as views."""
        linears = self.layout.parameters[parameter]
        parts = (self.layout.rows(parameter, linear, one) for one in tensor for linear in linears)
        return zip(self.names(parameter), parts, strict=True)


def expert_lists(module: nn.Module) -> dict[str, ExpertList]:
    """The `ExpertList` modules below ``module`` by their name in it."""
    return {name: part for name, part in module.named_modules() if isinstance(part, ExpertList)}


def expert_linears(module: nn.Module) -> dict[str, nn.Module]:
    """The linears of all experts below ``module`` by their name in it."""
    return {
        f"{name}.{index}.{linear}": part
        for name, experts in expert_lists(module).items()
        for index in range(experts.num_experts)
        for linear, part in experts[index].named_children()
    }


def split_experts(model: nn.Module, only: Collection[str] | None = None) -> list[str]:
    """Replace the fused experts of a skeleton (parameters on the meta device) by `ExpertList` modules, in place.

    Args:
        model: the skeleton.
        only: names of the modules to look at; default all.

    Returns:
        Names of the modules that were replaced; what cannot be shown to compute the same is left as it is.
    """
    verdicts: dict[tuple[type, ExpertLayout], Accumulation | None] = {}
    done = []
    for name, module in list(model.named_modules()):
        layout = _layout(module) if only is None or name in only else None
        if layout is None:
            continue
        key = (type(module), layout)
        if key not in verdicts:
            verdicts[key] = _try(module, layout)
        accumulation = verdicts[key]
        if accumulation is not None:
            _put(model, name, ExpertList(module, layout, accumulation).train(module.training))
            done.append(name)
    return done


def _try(module: nn.Module, layout: ExpertLayout) -> Accumulation | None:
    def split(probe: nn.Module) -> ExpertList:
        experts = ExpertList(probe, layout)
        for parameter in layout.parameters:
            fill_experts(experts, parameter, probe.get_parameter(parameter).detach())
        return experts

    shapes = _shapes(layout, PROBE_EXPERTS, PROBE_INNER, PROBE_WIDTH)
    return find_accumulation(module, shapes, PROBE_WIDTH, split)


def fill_experts(experts: ExpertList, parameter: str, tensor: Tensor, wanted: Collection[str] | None = None) -> None:
    """Give the linears their views of a fused parameter's ``tensor``; ``wanted`` names (default all) as in `names`."""
    for name, view in experts.views(parameter, tensor):
        if wanted is None or name in wanted:
            module, _, leaf = name.rpartition(".")
            experts.get_submodule(module)._parameters[leaf] = nn.Parameter(view, requires_grad=False)


@contextlib.contextmanager
def fused_in_place(model: nn.Module, lists: Mapping[str, ExpertList]) -> Iterator[None]:
    """Inside, the fused modules are back in the places of these `expert_lists`: for loaders that know only those."""
    for name, experts in lists.items():
        _put(model, name, experts.fused)
    try:
        yield
    finally:
        for name, experts in lists.items():
            _put(model, name, experts)


def join_experts(model: nn.Module) -> None:
    """Undo `split_experts` on a skeleton."""
    for name, experts in expert_lists(model).items():
        _put(model, name, experts.fused)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# -- what can be replaced ----------------------------------------------------------------------------------------------


def _layout(module: nn.Module) -> ExpertLayout | None:
    """The layout that a fused module declares, if it has just the parameters of that layout."""
    flags = [getattr(module, field.name, None) for field in dataclasses.fields(ExpertLayout)]
    eager = getattr(type(module).forward, "__wrapped__", None)
    if eager is None or not all(isinstance(flag, bool) for flag in flags):
        return None
    layout = ExpertLayout(*flags)  # type: ignore[arg-type]
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    down, experts = shapes.get("down_proj", ()), getattr(module, "num_experts", None)
    more = getattr(module, "has_post_expert_norm", True) or next(module.buffers(), None) is not None
    if more or len(down) != 3 or not isinstance(experts, int):
        return None
    inner, width = (down[1], down[2]) if layout.is_transposed else (down[2], down[1])
    return layout if shapes == _shapes(layout, experts, inner, width) else None


def _shapes(layout: ExpertLayout, experts: int, inner: int, width: int) -> dict[str, tuple[int, ...]]:
    """What the parameters of a layout look like."""
    found: dict[str, tuple[int, ...]] = {}
    for name, linears in layout.parameters.items():
        down = linears == ("down_proj",)
        out, entering = (width, inner) if down else (inner * len(linears), width)
        matrix = (experts, entering, out) if layout.is_transposed else (experts, out, entering)
        found[name] = (experts, out) if name.endswith("_bias") else matrix
    return found
