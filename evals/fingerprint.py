"""Which weights these are: a hash that does not depend on device, threads or the order of sums."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["model_fingerprint"]

_SAMPLES = 1024  # values of each tensor that go into the hash as they are
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def model_fingerprint(model: Any) -> str:
    """sha256 over names, types, shapes, samples and an exact checksum of every tensor of a model's state.

    The checksum adds the bits of all values as whole numbers, so that a change anywhere shows.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor) or value.device.type == "meta":
            continue
        words = value.detach().flatten()
        if words.dtype in (torch.bool, torch.complex64, torch.complex128):
            words = words.to(torch.float32)
        words = words.contiguous().view(_WORDS[words.element_size()])
        step = max(1, words.numel() // _SAMPLES)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {_checksum(words)}".encode())
        digest.update(words[::step].cpu().numpy().tobytes())
    return digest.hexdigest()


def _checksum(words: Tensor) -> int:
    total = 0
    for part in torch.split(words, 1 << 24):  # int64 sums of a part at a time: no copy of the whole tensor
        total += int(part.sum(dtype=torch.int64)) if part.numel() else 0
    return total
