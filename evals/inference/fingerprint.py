"""Which weights these are: a hash that does not depend on device, threads or the order of sums."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["model_fingerprint"]

_SAMPLES = 1024  # bytes of each tensor that go into the hash as they are


def model_fingerprint(model: Any) -> str:
    """sha256 over names, types, shapes, samples and an exact checksum of every tensor of a model's state.

    The checksum adds the bits of all values as whole numbers (modulo 2^64): a changed value shows wherever it is.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor) or value.device.type == "meta":
            continue
        raw = value.detach().contiguous().flatten().view(torch.uint8)
        if raw.storage_offset() % 8:  # a view of words must begin at one
            raw = raw.clone()
        step = max(1, raw.numel() // _SAMPLES)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {_checksum(raw)}".encode())
        digest.update(raw[::step].cpu().numpy().tobytes())
    return digest.hexdigest()


def _checksum(raw: Tensor) -> tuple[int, int]:
    """Sum of the words of eight bytes, and of the bytes behind them."""
    whole = raw.numel() // 8 * 8
    words = raw[:whole].view(torch.int64)
    return int(words.sum()) if whole else 0, int(raw[whole:].sum())
