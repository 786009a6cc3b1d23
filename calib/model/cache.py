"""The key-value cache of a model's forward, under the name that the installed transformers gives it.

transformers 5.24 renamed ``past_key_values`` (and ``cache_params``) to ``cache`` in arguments and outputs and warns
about the old names; earlier versions know only those. Modelling code that ships with a model can have either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers.utils.generic import ModelOutput

__all__ = ["cache_argument", "returned_cache"]

_NEW, _OLD = "cache", "past_key_values"
_RENAMED = hasattr(ModelOutput, "_replace_old_cache_name")  # what a forward with ``**kwargs`` alone is given


def cache_argument(forward: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """The keyword argument that hands ``cache`` to a forward.

    Args:
        forward: a model or its ``forward``.
        cache: a cache that an earlier pass returned, or ``None`` for none.

    Returns:
        One entry, to be unpacked into the call.
    """
    names = inspect.signature(getattr(forward, "forward", forward)).parameters
    if _NEW in names or (_OLD not in names and _RENAMED):
        return {_NEW: cache}
    return {_OLD: cache}


def returned_cache(output: Any) -> Any:
    """The cache that a forward returned in ``output``, or ``None`` where it returned none."""
    return output.cache if hasattr(output, _NEW) else getattr(output, _OLD, None)
