"""Linears that runtimes compute in one kernel must have one scheme: found by what a small copy of the model computes.

Runtimes such as vLLM join the linears of a module that read the same input (q, k and v; gate and up), and all experts
of a mixture. Which these are is no matter of names: a copy with few channels and random weights runs once, and the
input groups of its blocks are those of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from calib.checkpoint.sources.module import ModuleSource
from calib.checkpoint.sources.skeleton import quiet_transformers
from calib.errors import ModelError
from calib.model.input_groups import InputGroup
from calib.model.structure import find_blocks
from calib.precision import strict_float32
from calib.runner.runner import CalibrationRunner
from ptq.errors import UsageError
from ptq.proof.shrink import shrink_config
from ptq.scheme import Scheme

__all__ = ["refuse_different_schemes"]


def refuse_different_schemes(model: Any, linears: Iterable[str], schemes: Mapping[str, Scheme]) -> None:
    """Refuse linears of one kernel in different schemes.

    Args:
        model: the skeleton.
        linears: names of all its linears.
        schemes: of the quantized linears, by full name.

    Raises:
        UsageError: names two of them; or the model cannot be run, so that it is not known which these are.
    """
    blocks = tuple(f"{block}." for block in find_blocks(model))
    if len({schemes.get(name) for name in linears if name.startswith(blocks)}) == 1:
        return
    for names in _sets(model):
        found = {name: schemes.get(name) for name in names}
        if len(set(found.values())) > 1:
            first, *others = found.items()
            other = next((name, scheme) for name, scheme in others if scheme != first[1])
            raise UsageError(
                f"{_shown(*first)} and {_shown(*other)} are one kernel in runtimes such as vLLM and need one scheme. "
                "Quantize again with one for both, or export to native."
            )


def _shown(name: str, scheme: Scheme | None) -> str:
    return f"{name} ({'full precision' if scheme is None else scheme.describe()})"


def _sets(model: Any) -> Iterator[list[str]]:
    """Full names of the linears that are one kernel."""
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.no_grad(), strict_float32():
            runner = CalibrationRunner(_small(model), None, device=torch.device("cpu"), dtype=torch.float32)
            maps: dict[str, tuple[InputGroup, ...]] = {one.name: runner.map_of(one).groups for one in runner}
    except Exception as error:  # whatever modelling code says to sizes that it was not made for
        line = (str(error).strip().splitlines() or [""])[0][:160]
        raise UsageError(
            f"the linears have different schemes, and which of them read one input cannot be seen in a small copy of "
            f"the model ({type(error).__name__}: {line}). Quantize again with one scheme, or export to native."
        ) from error
    for block, groups in maps.items():
        sets: dict[tuple[int, str], list[str]] = {}
        for number, group in enumerate(groups):
            for name in group.linears:
                key = (-1, group.experts) if group.experts else (number, name.rpartition(".")[0])
                sets.setdefault(key, []).append(f"{block}.{name}")
        yield from sets.values()


def _small(model: Any) -> ModuleSource:
    """The model with few channels and all blocks, in memory."""
    blocks = len(find_blocks(model))
    config = type(model.config).from_dict(shrink_config(model.config.to_dict(), blocks, blocks))
    for key in ("quantization_config", "dtype"):
        if hasattr(config, key):
            delattr(config, key)
    if type(config) is not type(model.config):
        raise ModelError("the config is of another class when it is read again")
    return ModuleSource(type(model)(config).float(), "a small copy")
