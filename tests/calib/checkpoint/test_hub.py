"""Without a network: one attempt, one sentence, and what is in the cache serves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import calib.checkpoint.hub
from calib.checkpoint.files import resolve_model
from calib.checkpoint.hub import hub_access
from calib.data.sources import read_text
from calib.errors import DataError, ModelError
from evals.tasks.sources.hub_datasets import read_split
from evals.tasks.types import HubSource

NOWHERE = "http://127.0.0.1:9"


class _Session:
    """A client whose requests are counted."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.requests = error, 0

    def head(self, url: str, timeout: float) -> None:
        self.requests += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], _Session]:
    """The environment of a user: online as far as settings go."""

    def make(error: Exception | None) -> _Session:
        session = _Session(error)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(calib.checkpoint.hub, "get_session", lambda: session)
        return session

    return make


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (DataError, lambda: read_text("wikitext2:test")),
        (DataError, lambda: read_text("c4", limit=100)),
        (DataError, lambda: read_text("owner/data:train:text", limit=100)),
        (ModelError, lambda: resolve_model("owner/model")),
        (DataError, lambda: read_split("quiz", HubSource("owner/data", None, "test", None, dict), "test")),
    ],
)
def test_one_attempt_and_one_sentence(
    kind: type[Exception],
    call: Callable[[], Any],
    network: Callable[[Exception | None], _Session],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = network(OSError("Connection refused\nand more"))
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    with caplog.at_level(logging.WARNING), pytest.raises(kind) as caught:
        call()
    assert "the hub (http://127.0.0.1:9) cannot be reached (Connection refused), and it is not in the local" in str(
        caught.value
    )
    assert session.requests == 1
    assert not [record for record in caplog.records if "Retry" in record.getMessage()]
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_used(network: Callable[[Exception | None], _Session]) -> None:
    network(None)
    with hub_access() as unreachable:
        assert unreachable is None
        assert not constants.is_offline_mode()


def test_offline_is_only_for_the_time(network: Callable[[Exception | None], _Session]) -> None:
    import datasets

    network(OSError())
    before = datasets.config.HF_HUB_OFFLINE
    with hub_access() as unreachable:
        assert unreachable == "OSError"
        assert constants.is_offline_mode()
        assert datasets.config.HF_HUB_OFFLINE
    assert (constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE) == (False, before)


def test_a_name_that_is_no_hub_id_asks_nobody(
    network: Callable[[Exception | None], _Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = network(OSError())
    with pytest.raises(ModelError, match="not the form of a hub id"):
        resolve_model(str(tmp_path / "nowhere" / "at" / "all"))
    assert session.requests == 0
