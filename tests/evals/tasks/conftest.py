"""A hub of data sets in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[dict[str, Any]]]], list[tuple[Any, ...]]]:
    """A function that puts splits on a hub of our own, and returns the list of what is asked of it."""

    def put(splits: dict[str, list[dict[str, Any]]]) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load(path: str, name: str | None = None, *, split: str) -> list[dict[str, Any]]:
            calls.append((path, name, split))
            return splits[split]

        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    return put
