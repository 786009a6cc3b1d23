"""Rounded keys and values: which families, which values, and nothing without the mark."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from calib.model.cache import cache_argument, returned_cache
from ptq.errors import UsageError
from ptq.runtime.activations import quantize_tokens
from ptq.runtime.kv_cache import set_key_values, supports_key_values
from ptq.scheme import KeyValueScheme
from tests.support.tiny_models import FAMILIES, tiny_model

TOKENS = torch.arange(20)[None] * 7 % 390
NAMED = ("llama", "mistral", "qwen3", "gemma2", "phi3", "opt", "gpt2", "gpt_neox", "deepseek_v3", "gpt_oss")


def logits(model: Any, **kwargs: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(TOKENS, **kwargs).logits
    return result


@pytest.fixture
def seen() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keys and values that arrive at an attention function which a model can be set to by the name ``recording``."""
    arrived: list[tuple[Tensor, Tensor]] = []

    def recording(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        arrived.append((key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)
    yield arrived
    AttentionInterface._global_mapping.pop("recording")
    AttentionMaskInterface._global_mapping.pop("recording")


@pytest.mark.parametrize("scheme", [KeyValueScheme(4), KeyValueScheme(3, True), KeyValueScheme(4, share=0.5)])
def test_attention_gets_rounded_keys_and_values(scheme: KeyValueScheme, seen: list[tuple[Tensor, Tensor]]) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("recording")
    logits(model)
    assert set_key_values(model, scheme) == len(list(model.modules()))
    logits(model)
    (key, value), (rounded_key, rounded_value) = seen[0], seen[model.config.num_hidden_layers]
    assert key.shape == (1, 2, 20, 16)  # heads of keys, not of queries
    assert not torch.equal(rounded_key, key)
    for plain, rounded in ((key, rounded_key), (value, rounded_value)):
        assert torch.equal(rounded, quantize_tokens(plain, scheme.bits, scheme.symmetric, scheme.share))
    one_head = value[0, 1, 7, : round(16 * scheme.share)]
    top = 7 if scheme.bits == 4 else 3
    step = (
        value[0, 1, 7].abs().max() / top
        if scheme.symmetric
        else (value[0, 1, 7].amax() - value[0, 1, 7].amin()) / (2 * top + 1)
    )
    error = (rounded_value[0, 1, 7, : len(one_head)] - one_head).abs().max()
    assert 0 < error <= step / 2 * (1 + 1e-5)


@pytest.mark.parametrize("family", NAMED)
def test_marks_work_come_and_go(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    assert supports_key_values(model, lambda: logits(model))
    assert torch.equal(logits(model), before), "asking changes nothing"
    set_key_values(model, KeyValueScheme(2))
    coarse = logits(model)
    assert not torch.allclose(coarse, before, rtol=1e-2, atol=1e-2)
    set_key_values(model, KeyValueScheme(8))
    assert (logits(model) - before).norm() < 0.1 * (coarse - before).norm()
    assert set_key_values(model, None) == 0
    assert torch.equal(logits(model), before)
    assert model.state_dict().keys() == tiny_model(family).state_dict().keys()


def test_eager_is_covered_and_masks_are_the_same() -> None:
    for family in ("llama", "mistral", "gemma3_text"):
        model = tiny_model(family)
        set_key_values(model, KeyValueScheme(4))
        model.set_attn_implementation("sdpa")
        sdpa = logits(model)
        model.set_attn_implementation("eager")  # a function of the model's own file
        torch.testing.assert_close(logits(model), sdpa, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"falcon"}))
def test_every_family_but_one_is_supported_block_by_block(family: str) -> None:
    model = tiny_model(family)
    blocks = next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) >= 2)
    assert all(supports_key_values(block, lambda: logits(model)) for block in blocks)


@pytest.mark.parametrize("family", ["falcon", "mamba"])
def test_attention_of_its_own_is_found_out(family: str) -> None:
    model = tiny_model(family)
    assert not supports_key_values(model, lambda: logits(model))


def test_asking_leaves_marks_alone() -> None:
    model = tiny_model("llama")
    set_key_values(model.model.layers[0], KeyValueScheme(2))
    before = logits(model)
    assert supports_key_values(model, lambda: logits(model))
    assert torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError):
        supports_key_values(model, lambda: 1 // 0)
    assert torch.equal(logits(model), before)
    set_key_values(model.model.layers[1], KeyValueScheme(2))
    assert not torch.equal(logits(model), before), "blocks are marked one by one"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_cache_gives_the_same(family: str) -> None:
    model = tiny_model(family)
    set_key_values(model, KeyValueScheme(3))
    whole = logits(model, use_cache=False)
    with torch.inference_mode():
        cache, steps = None, []
        for part in TOKENS.split([9, 1, 1, 1, 8], dim=1):
            result = model(part, use_cache=True, **cache_argument(model, cache))
            cache, steps = returned_cache(result), [*steps, result.logits]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    cached, plain = (model.generate(TOKENS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_copies_keep_their_marks_and_gradients_flow() -> None:
    model = tiny_model("llama")
    set_key_values(model, KeyValueScheme(3))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert pickle.loads(pickle.dumps(KeyValueScheme(3))) == KeyValueScheme(3)
    twin(TOKENS).logits.square().mean().backward()
    gradient = twin.model.layers[0].self_attn.k_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "kv_bits must be a whole number from 2 to 8"),
        ({"bits": None}, "kv_bits is missing"),
        ({"bits": 4, "symmetric": "no"}, "kv_symmetric must be true or false"),
        ({"bits": 4, "share": 1.5}, "from 0 to 1, got 1.5"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        KeyValueScheme(**fields)
