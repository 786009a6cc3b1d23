"""Quantized keys and values, for any model whose attention goes through transformers' attention interface.

Attention modules of transformers ask one object, an `AttentionInterface`, for the function that attends (``sdpa``,
flash, flex, or the module's own eager function), and call it as ``function(module, query, key, value, ...)`` with keys
after the rotary embedding and after the cache. `set_key_values` teaches that class to hand out the same function behind
a check: of a module that carries a mark, keys and values are rounded first; any other call goes through unchanged. The
name of the implementation stays what it is, and with it masks, and whatever else a model decides by that name.

The cache keeps what it is given, in full precision, and a token is rounded each time it is attended to. It has a range
of its own, so that this gives the same values as rounding it once, before the cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from ptq.runtime.activations import quantize_tokens
from ptq.scheme import KeyValueScheme

__all__ = ["KeyValueScheme", "set_key_values", "supports_key_values"]

_MARK = "_ptq_kv"


def set_key_values(module: nn.Module, scheme: KeyValueScheme | None) -> int:
    """Have all attention below ``module`` (a model, a block; the meta device is fine) round its keys and values.

    The mark is set on every module below, because which of them ask the attention interface shows only in a pass: see
    `supports_key_values`. A model that is copied keeps its marks; a checkpoint carries them in its config.

    Args:
        scheme: ``None`` takes the marks away.

    Returns:
        The number of marked modules.
    """
    _teach()
    below = list(module.modules())
    for part in below:
        if scheme is not None:
            setattr(part, _MARK, scheme)
        elif hasattr(part, _MARK):
            delattr(part, _MARK)
    return len(below) if scheme is not None else 0


def supports_key_values(block: nn.Module, run: Callable[[], object]) -> bool:
    """Whether the attention below ``block`` goes through the attention interface when ``run()`` runs it.

    False for families that attend with code of their own (e.g. Falcon), and for blocks without attention. Marks are
    left as they were.
    """
    _teach()
    probe = _Probe()
    before = {part: vars(part).get(_MARK) for part in block.modules()}
    try:
        for part in before:
            setattr(part, _MARK, probe)
        run()
    finally:
        for part, mark in before.items():
            if mark is None:
                delattr(part, _MARK)
            else:
                setattr(part, _MARK, mark)
    return probe.calls > 0


@dataclasses.dataclass
class _Probe:
    """A mark that counts calls and changes nothing."""

    calls: int = 0


def _attend(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """An attention function behind the check of its module's mark."""
    mark = getattr(module, _MARK, None)
    if isinstance(mark, KeyValueScheme):
        key = quantize_tokens(key, mark.bits, mark.symmetric, mark.share)  # [batch, key heads, tokens, head_dim]
        value = quantize_tokens(value, mark.bits, mark.symmetric, mark.share)
    elif isinstance(mark, _Probe):
        mark.calls += 1
    return function(module, query, key, value, *args, **kwargs)


def _behind_check(found: Any) -> Any:
    if not callable(found) or (isinstance(found, functools.partial) and found.func is _attend):
        return found
    return functools.partial(_attend, found)


def _teach() -> None:
    """Let every attention interface hand out functions behind the check. Calling it again changes nothing.

    Both ways of asking are covered: ``get_interface(name, eager_function)``, and ``interface[name]`` of older code.
    """
    if getattr(AttentionInterface, _MARK, False):
        return
    get_interface: Callable[..., Any] = AttentionInterface.get_interface
    get_item: Callable[..., Any] = AttentionInterface.__getitem__

    @functools.wraps(get_interface)
    def checked_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Any:
        return _behind_check(get_interface(self, *args, **kwargs))

    @functools.wraps(get_item)
    def checked_item(self: AttentionInterface, key: str) -> Any:
        return _behind_check(get_item(self, key))

    for name, value in {"get_interface": checked_interface, "__getitem__": checked_item, _MARK: True}.items():
        setattr(AttentionInterface, name, value)
