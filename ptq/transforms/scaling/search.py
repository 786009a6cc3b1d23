"""Channel scalings that leave a block's output unchanged, found by trying (SmoothQuant, OmniQuant's LET, SliderQuant).

    qkv, mlp   gain (and bias) of a norm / s       columns of everything that reads the norm * s
    out        rows of v (and its bias) / s        columns of the linear that reads attention's output * s
    down       rows of up (and its bias) / s       columns of down * s, one scaling an expert
    qk         rows of q, or q's norm / s          rows of k, or k's norm * s; one scale for two channels that a rotary
                                                   embedding turns into each other

Nothing is known of model classes. A candidate is kept only if a pass with random scales between 1/2 and 2 gives the
block's output; that half of it does change the output is tried as well. Of a list of experts, the first one is tried.

Sources: SmoothQuant (arXiv 2211.10438), section 4; OmniQuant (arXiv 2308.13137), section 3.3. That the channels of a
rotary pair must share a scale follows from the rotation, which mixes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import UsageError
from calib.model.block_inputs import BlockCall
from calib.model.experts import ExpertList, expert_lists
from calib.model.structure import find_linears, linear_weight
from ptq.transforms.scaling.channel_paths import ChannelPath, find_paths, head_width
from ptq.transforms.scaling.query_keys import heads_of, query_key_scaling
from ptq.transforms.scaling.trial import Trial
from ptq.transforms.scaling.uses import ScaleUse, Scaling, apply_scaling, fold_scaling
from ptq.transforms.tracing import Norm, Trace, expert_readers, trace, with_values

__all__ = [
    "ScaleUse",
    "Scaling",
    "Scalings",
    "apply_scaling",
    "find_scalings",
    "fold_scaling",
    "in_float32",
    "unsupported_reason",
]

_ROWS = 32  # that an expert is tried on


@dataclasses.dataclass(frozen=True)
class Scalings:
    """What was found for a block; good for all blocks of its kind (`unsupported_reason` tries one on another block).

    Args:
        scalings: all of them together leave the output unchanged, too.
        missing: linears whose input channels have no scale, or ``q and k``, and why: ``"linears: reason"``.
    """

    scalings: tuple[Scaling, ...]
    missing: tuple[str, ...]


def find_scalings(block: nn.Module, run: Callable[[], Tensor], *, seed: int = 0) -> Scalings:
    """The scalings of one block.

    Args:
        block: with its weights in float32 (see `in_float32`); it is unchanged afterwards.
        run: one pass through it on real inputs, of two tokens or more: the output ``[sequences, tokens, width]``.
        seed: of the scales that are tried.

    Raises:
        UsageError: the block is not in float32.
        ModelError: the block cannot be run.
    """
    _check_dtype(block)
    with torch.no_grad():
        return _Finder(block, run, seed).all()


def unsupported_reason(block: nn.Module, run: Callable[[], Tensor], scaling: Scaling, *, seed: int = 0) -> str | None:
    """What is against a scaling that was found on another block, in words; ``None`` if nothing is.

    A scaling of one expert is tried on that expert, as far as it can be reached in this pass.
    """
    return Trial(block, run, seed).unsupported_reason(scaling)


@contextlib.contextmanager
def in_float32(block: nn.Module, call: BlockCall, hidden: Tensor, sequences: int = 1) -> Iterator[Callable[[], Tensor]]:
    """Inside, the block is in float32, and what is yielded runs it so on the first sequences, whatever it is stored in.

    Args:
        block: with its weights; call: how the model calls it; hidden: what enters it ``[sequences, tokens, width]``.
        sequences: how many of them; a search makes some fifty passes.
    """
    batch = len(hidden)

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            cut = value[:sequences] if value.ndim > 1 and len(value) == batch else value
            return cut.float() if cut.is_floating_point() else cut
        if isinstance(value, tuple):
            return tuple(wide(part) for part in value)
        return value

    own = BlockCall(wide(call.args), {key: wide(value) for key, value in call.kwargs.items()}, call.hidden_key)
    values = {n: p.detach().float() for n, p in block.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    with with_values(block, values):
        yield lambda: own(block, wide(hidden))


def _check_dtype(block: nn.Module) -> None:
    for name, parameter in block.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"{name} is in {parameter.dtype}: whether a scaling leaves a block unchanged is tried in float32. Use "
                f"ptq.transforms.scaling.search.in_float32."
            )


class _Finder:
    """The search in one block."""

    def __init__(self, block: nn.Module, run: Callable[[], Tensor], seed: int) -> None:
        self.block, self.run = block, run
        self.found: Trace = trace(block, run)
        self.trial = Trial(block, run, seed)
        self.shape = (self.trial.output.shape[0], self.trial.output.shape[1])
        self.scalings: list[Scaling] = []
        self.reasons: dict[str, str] = {}  # by linear

    def all(self) -> Scalings:
        paths = find_paths(self.block, self.run, self.found.calls, self.shape)
        attention = [path for path in paths if path.mixes]
        self._norms(attention)
        for path in attention:
            self._path(path, "out")
        for path in [path for path in paths if not path.mixes]:
            self._path(path, "down")
        self._experts()
        missing = self._query_keys(attention)
        return Scalings(tuple(self.scalings), (*self._uncovered(), *missing))

    def _add(self, scaling: Scaling, *, trial: Trial | None = None, signed: bool = False) -> bool:
        """Keep a scaling if it stands the trial, and note why not for the linears whose columns it scales."""
        problem = (trial or self.trial).unsupported_reason(scaling, signed=signed)
        if problem is None:
            self.scalings.append(scaling)
            return True
        for use in scaling.uses:
            if use.axis == 1:
                self.reasons[use.parameter.removesuffix(".weight")] = f"with scales, {problem}"
        return False

    def _free_name(self, wanted: str, other: str) -> str:
        return wanted if all(scaling.name != wanted for scaling in self.scalings) else other

    # -- norms -------------------------------------------------------------------------------------------------------

    def _norms(self, attention: list[ChannelPath]) -> None:
        order = list(self.found.calls)
        ends = [order.index(path.target) for path in attention]
        for norm in self.found.norms.values():
            readers = [linear for name in norm.readers for linear in self._reading(name)]
            if not readers:
                continue
            first = order.index(norm.readers[0])
            own = norm.name.rpartition(".")[2]
            kind = "mlp" if ends and first > ends[0] else "qkv" if not ends or first < ends[0] else own
            self._add(self._norm_scaling(self._free_name(kind, own), norm, readers))

    def _reading(self, name: str) -> list[str]:
        """Linears (and routers) that read what a module is called with."""
        module = self.block.get_submodule(name)
        if isinstance(module, ExpertList):
            readers, _ = expert_readers(module)
            return [f"{name}.{index}.{linear}" for index in range(module.num_experts) for linear in readers]
        weight = module._parameters.get("weight")
        return [name] if weight is not None and weight.ndim == 2 else []

    def _norm_scaling(self, name: str, norm: Norm, readers: list[str]) -> Scaling:
        size = len(self.block.get_parameter(f"{norm.name}.weight"))
        index = torch.arange(size)
        uses = [ScaleUse(f"{norm.name}.weight", 0, -1, index, norm.offset)]
        if norm.bias:
            uses.append(ScaleUse(f"{norm.name}.bias", 0, -1, index))
        return Scaling(name, size, (*uses, *(ScaleUse(f"{reader}.weight", 1, 1, index) for reader in readers)))

    # -- from linear to linear ---------------------------------------------------------------------------------------

    def _path(self, path: ChannelPath, kind: str) -> None:
        """A path's scaling. Of two that end at one linear (both sides of a gated ReLU) the one that bears negative
        scales is kept, which is the side without the activation."""
        scaling = _path_scaling(self.block, path, self._free_name(kind, path.source.rpartition(".")[2]))
        rivals = [one for one in self.scalings if _columns(one) & _columns(scaling)]
        if not rivals:
            self._add(scaling)
        elif self.trial.passes(scaling, signed=True) and not self.trial.passes(rivals[0], signed=True):
            place = self.scalings.index(rivals[0])
            self.scalings[place] = dataclasses.replace(scaling, name=rivals[0].name)

    def _experts(self) -> None:
        """One scaling an expert. The first expert is tried, on rows of its own: few tokens reach each in a pass."""
        for where, experts in expert_lists(self.block).items():
            expert = experts[0]
            readers, _ = expert_readers(experts)
            weight = linear_weight(expert.get_submodule(readers[0]))
            rows = torch.randn(1, _ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
            run = _runner(expert, rows)
            trial = Trial(expert, run, self.trial.seed)
            for path in find_paths(expert, run, trace(expert, run).calls, (1, _ROWS)):
                scaling = _path_scaling(expert, path, "down")
                problem = trial.unsupported_reason(scaling)
                for index in range(experts.num_experts):
                    name = f"{where}.{index}"
                    if problem is None:
                        uses = (dataclasses.replace(u, parameter=f"{name}.{u.parameter}") for u in scaling.uses)
                        self.scalings.append(Scaling(f"{name}.down", scaling.size, tuple(uses)))

    def _query_keys(self, attention: list[ChannelPath]) -> list[str]:
        missing = []
        for path in attention:
            reason = "some of its channels were always zero"
            if bool((path.index >= 0).all()):
                heads = heads_of(path, head_width(self.block, self.run, path, self.shape))
                name = self._free_name("qk", f"{path.target.rpartition('.')[0]}.qk")
                scaling = query_key_scaling(self.block, self.trial, self.found, path, heads, name)
                if scaling is not None:
                    self.scalings.append(scaling)
                    continue
                reason = "no scales of two linears or norms left the attention's products as they are"
            missing.append(f"q and k before {path.target}: {reason}")
        return missing

    # -- what is left ------------------------------------------------------------------------------------------------

    def _uncovered(self) -> list[str]:
        """Linears of which no scaling has the columns, those with one input together."""
        covered = {use.parameter for scaling in self.scalings for use in scaling.uses if use.axis == 1}
        experts = tuple(f"{name}." for name in expert_lists(self.block))
        groups: dict[object, list[str]] = {}
        for name in find_linears(self.block):
            if f"{name}.weight" not in covered:
                call = self.found.calls.get(name)
                key: object = call.input.data_ptr() if call is not None else name
                if name.startswith(experts):
                    where, _, linear = name.rpartition(".")
                    key, name = (where.rpartition(".")[0], linear), f"{where.rpartition('.')[0]}.*.{linear}"
                if name not in groups.setdefault(key, []):
                    groups[key].append(name)
        return [f"{', '.join(names)}: {self._reason(names[0])}" for names in groups.values()]

    def _reason(self, name: str) -> str:
        if name in self.reasons:
            return self.reasons[name]
        if name not in self.found.calls and "*" not in name:
            return "no token came here"
        return "what comes here is neither a norm's output nor a linear's that is only multiplied on its way"


def _columns(scaling: Scaling) -> set[str]:
    return {use.parameter for use in scaling.uses if use.axis == 1}


def _path_scaling(root: nn.Module, path: ChannelPath, name: str) -> Scaling:
    """Rows of the source that arrive anywhere are divided, the columns where they arrive multiplied."""
    rows = torch.unique(path.index[path.index >= 0])
    source = root.get_submodule(path.source)
    of_row = torch.full((linear_weight(source).shape[0],), -1)
    of_row[rows] = torch.arange(len(rows))
    of_column = torch.where(path.index < 0, -1, of_row[path.index.clamp(min=0)])
    uses = [ScaleUse(f"{path.source}.weight", 0, -1, of_row)]
    if source._parameters.get("bias") is not None:
        uses.append(ScaleUse(f"{path.source}.bias", 0, -1, of_row))
    return Scaling(name, len(rows), (*uses, ScaleUse(f"{path.target}.weight", 1, 1, of_column)))


def _runner(expert: nn.Module, rows: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        output: Tensor = expert(rows[0])
        return output[None]

    return run
