"""Steps on a skeleton that sources share: emptying parameters, sizes of single experts, loading without messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

__all__ = ["SAMPLE_BYTES", "expert_sizes", "quiet_transformers", "release_parameters"]

SAMPLE_BYTES = 1 << 12  # per sample of a tensor for the fingerprint


def expert_sizes(model: nn.Module, names: frozenset[str]) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Parameters that are cut out of fused ones and come in the model's dtype."""
    for name in sorted(names):
        parameter = model.get_parameter(name)
        yield name, tuple(parameter.shape), parameter.nbytes


def release_parameters(model: nn.Module, names: frozenset[str], dtype: torch.dtype) -> None:
    """Put parameters back on the meta device, as the skeleton had them."""
    for name in names:
        module, _, leaf = name.rpartition(".")
        part = model.get_submodule(module)
        parameter = part._parameters.get(leaf)
        if parameter is not None:
            empty = torch.empty_like(parameter, dtype=dtype, device="meta")
            part._parameters[leaf] = nn.Parameter(empty, requires_grad=False)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and reports of transformers for every block; its errors are raised as usual."""
    level = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
