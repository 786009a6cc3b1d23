"""A store of one base."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.texts.base_cache import BaseStore, TextStore
from tests.evals.texts.damage import LOADED


@pytest.fixture
def store(tmp_path: Path) -> TextStore:
    found = BaseStore(tmp_path / "cache", "some/MODEL", LOADED, "print").text({"text": "x"})
    found.begin(3)
    return found
