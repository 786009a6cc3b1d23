"""Sampling with a static cache: the tokens of `sample_steps` and of `generate`, one step repeated, reasons said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.data.sampling import sample_steps
from calib.data.static_sampling import decode_steps, static_steps, unsupported_reason
from calib.errors import NumericalError
from tests.calib.data.test_sampling import llama
from tests.support.cpu_graph import CpuGraph
from tests.support.tiny_models import tiny_model

PROMPT = torch.tensor([[3, 9, 1, 7], [3, 4, 4, 2]])


def numbers(steps: int) -> Tensor:
    return torch.rand(2, steps, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_the_tokens_are_those_of_a_growing_cache(temperature: float, steps: int) -> None:
    model, capture = llama(), CpuGraph()
    uniform = numbers(steps)
    slow = torch.stack(list(sample_steps(model, PROMPT, uniform, temperature=temperature)))
    fast = torch.stack(list(static_steps(model, PROMPT, uniform, temperature=temperature, capture=capture)))
    assert torch.equal(slow, fast)
    assert (capture.captures, capture.replays) == ((1, steps - 2) if steps > 2 else (0, 0))
    assert torch.equal(fast, torch.stack(list(decode_steps(model, PROMPT, uniform, temperature=temperature))))


def test_greedy_tokens_are_those_of_generate() -> None:
    model = llama(eos_token_id=None, pad_token_id=0)
    fast = torch.stack(list(static_steps(model, PROMPT, numbers(12), temperature=0, capture=CpuGraph())), 1)
    for extra in ({}, {"cache_implementation": "static"}):
        whole = model.generate(
            PROMPT, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(PROMPT), **extra
        )
        assert torch.equal(whole[:, PROMPT.shape[1] :], fast)


def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_so() -> None:
    def refuse(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model, said = llama(), []
    fast = list(static_steps(model, PROMPT, numbers(6), capture=refuse, on_fallback=said.append))
    assert torch.equal(torch.stack(fast), torch.stack(list(sample_steps(model, PROMPT, numbers(6)))))
    assert said == [
        "a step of it cannot be captured in a graph (RuntimeError: operation not permitted when stream is capturing)"
    ]


SLIDING = "StaticSlidingWindowLayer"


def test_compiled_steps_give_the_same_tokens_and_what_does_not_compile_runs_eagerly() -> None:
    model, calls, said = llama(), [], list[str]()
    slow = torch.stack(list(sample_steps(model, PROMPT, numbers(6))))

    def compiled(model: Any) -> Any:
        calls.append("compiled")
        return torch.compile(model.__call__, fullgraph=True, backend="eager")

    def broken(model: Any) -> Any:
        def forward(**inputs: Any) -> Any:
            model(**inputs)  # the cache has the token
            raise RuntimeError("no compiler")

        return forward

    torch._dynamo.reset()
    for compile_step in (compiled, broken):
        capture = CpuGraph() if compile_step is broken else lambda step, device: step
        fast = static_steps(
            model, PROMPT, numbers(6), capture=capture, compile_step=compile_step, on_fallback=said.append
        )
        assert torch.equal(torch.stack(list(fast)), slow)
    torch._dynamo.reset()
    assert calls == ["compiled"]
    assert said == ["a step of it cannot be compiled (RuntimeError: no compiler)"]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        *((family, None) for family in ("llama", "qwen2", "qwen3", "phi3", "phi", "gpt2", "gpt_neox", "olmo2")),
        *((family, SLIDING) for family in ("mistral", "gemma2", "gemma3_text")),
        ("opt", "cannot be captured in a graph (AssertionError"),  # reads its position on the CPU
    ],
)
def test_families(family: str, reason: str | None) -> None:
    model, capture, said = tiny_model(family), CpuGraph(), []
    fast = static_steps(model, PROMPT, numbers(5), temperature=0, capture=capture, on_fallback=said.append)
    slow = sample_steps(model, PROMPT, numbers(5), temperature=0)
    assert torch.equal(torch.stack(list(fast)), torch.stack(list(slow)))
    assert (capture.replays, len(said)) == ((3, 0) if reason is None else (0, 1))
    assert reason is None or reason in said[0]
    assert (SLIDING in (unsupported_reason(model, 64) or "")) == (reason == SLIDING)


def test_a_model_without_a_static_cache_is_sampled_as_before() -> None:
    model: Any = llama()
    model._can_compile_fullgraph = False
    said: list[str] = []
    fast = list(static_steps(model, PROMPT, numbers(4), capture=CpuGraph(), on_fallback=said.append))
    assert torch.equal(torch.stack(fast), torch.stack(list(sample_steps(model, PROMPT, numbers(4)))))
    assert said == ["LlamaForCausalLM does not support static caches"]


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="NaN or infinite while sampling"):
        list(static_steps(model, PROMPT, numbers(4), capture=CpuGraph()))
