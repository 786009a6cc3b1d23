"""The cache's name: whatever transformers calls it, it is handed on without a warning."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.utils import ModelOutput, logging

from calib.model.cache import cache_argument, returned_cache
from tests.support.tiny_models import tiny_model


def new(input_ids: Any, cache: Any = None) -> None: ...


def old(input_ids: Any, past_key_values: Any = None) -> None: ...


def anything(**inputs: Any) -> None: ...


@pytest.mark.parametrize(("forward", "name"), [(new, "cache"), (old, "past_key_values")])
def test_a_forward_says_its_name(forward: Any, name: str) -> None:
    assert cache_argument(forward, 7) == {name: 7}
    assert cache_argument(SimpleNamespace(forward=forward), 7) == {name: 7}


def test_a_forward_that_takes_anything_gets_the_name_of_the_installed_version() -> None:
    model = tiny_model("llama")
    assert cache_argument(anything, 7).keys() == cache_argument(model, 7).keys()


def test_what_was_returned() -> None:
    assert returned_cache(SimpleNamespace(cache=7)) == 7
    assert returned_cache(SimpleNamespace(past_key_values=7)) == 7
    assert returned_cache(SimpleNamespace(cache=None)) is None
    assert returned_cache(SimpleNamespace()) is None
    assert returned_cache(None) is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_real_model_goes_on_from_its_cache_without_a_word(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_model(family), torch.tensor([[1, 2, 3, 4]])
    logging.enable_propagation()
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("error")
            first = model(ids[:, :3], use_cache=True)
            assert isinstance(first, ModelOutput)
            second = model(ids[:, 3:], use_cache=True, **cache_argument(model, returned_cache(first)))
    finally:
        logging.disable_propagation()
    torch.testing.assert_close(second.logits[:, 0], model(ids).logits[:, 3], rtol=1e-4, atol=1e-4)
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]
