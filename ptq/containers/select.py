"""Which container an output is written in, and why, as far as rules say; `ptq.proof` then tries it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ptq.containers.awq import AWQ
from ptq.containers.base import Container
from ptq.containers.compressed_tensors import COMPRESSED_TENSORS
from ptq.containers.gptq import GPTQ, GPTQ_V2
from ptq.containers.native import NATIVE
from ptq.containers.vllm_tensors import VLLM_TENSORS
from ptq.errors import UsageError
from ptq.scheme import KeyValueScheme, Scheme

__all__ = ["CONTAINERS", "select_container"]

CONTAINERS: dict[str, Container] = {
    row.name: row for row in (COMPRESSED_TENSORS, VLLM_TENSORS, NATIVE, GPTQ, GPTQ_V2, AWQ)
}
"""The table."""
_CHOICES: dict[str, tuple[Container, ...]] = {
    "auto": (COMPRESSED_TENSORS, NATIVE),  # what stock transformers cannot run is not chosen unasked
    "compressed-tensors": (COMPRESSED_TENSORS, VLLM_TENSORS),
    "gptq": (GPTQ, GPTQ_V2),
}
"""What a name stands for: the first of these that can carry the result; any other name is a row of the table."""


def select_container(
    requested: str,
    schemes: Mapping[str, Scheme | None],
    linears: Mapping[str, nn.Module],
    model: nn.Module,
    key_values: KeyValueScheme | None = None,
) -> tuple[str, str]:
    """Name and reason of the container for a recipe's ``container`` (``auto`` or a name of `CONTAINERS`).

    ``schemes``, ``linears``, ``model`` and ``key_values`` are those of `Container.unsupported_reason`.

    Raises:
        UsageError: a container was asked for that cannot carry the result.
    """
    if requested == NATIVE.name:
        return NATIVE.name, "asked for"
    first = ""
    for container in _CHOICES.get(requested, (CONTAINERS[requested],) if requested in CONTAINERS else ()):
        problem = container.unsupported_reason(schemes, linears, model, key_values)
        if problem is None:
            return container.name, first or "it carries every scheme here"
        first = problem if requested != "auto" else first or problem
    able = dict.fromkeys(
        container.name.removesuffix("_v2").removesuffix("-vllm")
        for container in CONTAINERS.values()
        if container.unsupported_reason(schemes, linears, model, key_values) is None
    )
    raise UsageError(f"the container {requested} cannot carry this: {first}. What can: {', '.join(able)}.")
