"""`canonical_json`: equal data, equal bytes; what checksums of plain data are taken over."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["canonical_json"]


def canonical_json(data: Any) -> bytes:
    """Compact JSON with sorted keys in UTF-8.

    Raises:
        TypeError, ValueError: not plain data, or NaN or Infinity in it.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
