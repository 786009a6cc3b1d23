"""Random tensors by seed."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.learning.rounding import Kind

KINDS: tuple[Kind, ...] = ("nearest", "offset", "soft")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))
