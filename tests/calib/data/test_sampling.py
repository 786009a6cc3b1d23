"""Sampling from a model: the same draws without a cache, the right distribution, errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from calib.data.sampling import check_token, draw, sample_from_model, sample_steps
from calib.errors import ModelError, NumericalError


def llama(**changes: object) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **({"bos_token_id": 3, "eos_token_id": 4} | changes),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data.mul_(4)
    return model


def slow_samples(model: LlamaForCausalLM, samples: int, seqlen: int, seed: int) -> Tensor:
    """Token by token over the whole prefix, without a cache, one sequence at a time."""
    uniform = torch.rand(samples, seqlen, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = []
    for draws in uniform:
        row = [3]
        for one in draws[1:]:
            p = torch.softmax(model(torch.tensor([row])).logits[0, -1].detach(), -1).double()
            row.append(int((p.cumsum(0) <= one * p.sum()).sum()))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_equals_sampling_without_a_cache(batch: int) -> None:
    model = llama()
    state = torch.get_rng_state()
    found = sample_from_model(model, 3, 7, 11, batch=batch)
    assert torch.equal(found, slow_samples(model, 3, 7, 11))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(found, sample_from_model(model, 3, 7, 12, batch=batch))


def test_without_bos_the_first_token_is_drawn() -> None:
    first = sample_from_model(llama(bos_token_id=None), 40, 1, 0)[:, 0]
    assert first.min() >= 0
    assert first.max() < 50
    assert len(set(first.tolist())) > 10


def test_the_samples_can_enter_training() -> None:
    assert not sample_from_model(llama(), 1, 3, 0).is_inference()


def test_temperature_zero_is_the_most_probable_token() -> None:
    model = llama()
    prompt = torch.tensor([[3, 9, 1]])
    (token,) = sample_steps(model, prompt, torch.zeros(1, 1, dtype=torch.float64), temperature=0)
    assert token.item() == model(prompt).logits[0, -1].argmax().item()


def test_draws_follow_the_distribution_and_never_pick_the_impossible() -> None:
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25, 0.0]).log().expand(4000, -1)
    uniform = torch.arange(4000, dtype=torch.float64) / 4000
    counts = torch.bincount(draw(logits, uniform, 1.0), minlength=5)
    assert counts[1] == counts[4] == 0
    assert (counts - torch.tensor([2000, 0, 1000, 1000, 0])).abs().max() <= 1
    sharper = torch.bincount(draw(logits, uniform, 0.5), minlength=5)
    assert abs(int(sharper[0]) - 4000 * 4 // 6) <= 1


def test_errors() -> None:
    with pytest.raises(NumericalError, match="NaN or infinite while sampling"):
        check_token(draw(torch.tensor([[0.0, float("nan")]]), torch.zeros(1, dtype=torch.float64), 1.0))

    class Cacheless:
        device = torch.device("cpu")

        def __call__(self, **inputs: object) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(1, 1, 5))

    with pytest.raises(ModelError, match="Cacheless returns no key-value cache"):
        next(sample_steps(Cacheless(), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)))
