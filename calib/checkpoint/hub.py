"""The model hub, asked once: where it cannot be reached, what is in the local cache serves, and nothing is retried.

The hub's client tries every request six times with growing pauses and a raw line each. That is right for a server that
stumbles, and a page of noise for a machine without a network.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from huggingface_hub import constants, get_session

__all__ = ["hub_access", "no_hub"]

_SECONDS = 10.0  # for an answer: a network that drops everything is not told from a slow one before that


@contextlib.contextmanager
def hub_access() -> Iterator[str | None]:
    """Within it, the hub's clients work offline if the hub cannot be reached; gives the reason, ``None`` if it can."""
    reason = _unreachable()
    if reason is None or constants.is_offline_mode():
        yield reason
        return
    switches = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in switches]
    for module in switches:
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]  # the switch that both libraries look at
    try:
        yield reason
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


def no_hub(reason: str, what: str) -> str:
    """The sentence for what is neither to be had from the hub nor in its cache."""
    return f"the hub ({constants.ENDPOINT}) cannot be reached ({reason}), and {what} is not in the local cache"


def _unreachable() -> str | None:
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # of the client's HTTP library, which is its own affair
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None
