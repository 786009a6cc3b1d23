"""How fast a model writes: seconds to the first token, tokens per second after it, memory.

What is timed is what ``ptq generate`` runs: on a GPU a static cache and a captured step, for every model alike.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from calib.data.static_sampling import decode_steps
from evals.inference.weight_bytes import weight_bytes

__all__ = ["GenerationSpeed", "measure_generation"]


@dataclasses.dataclass(frozen=True)
class GenerationSpeed:
    """One model's speed, for one sequence.

    Args:
        prompt_tokens: tokens that are read at once.
        new_tokens: tokens written after the first.
        first_token_seconds: median, from the call to the first token.
        tokens_per_second: one over the median time of a token after the first.
        weight_bytes: parameters and buffers.
        peak_bytes: on a GPU the most memory that torch held while writing; on a CPU the process's memory afterwards.
        captured: its steps are replayed from a CUDA graph.
        eager_reason: why they are not, or not compiled, on a GPU.
    """

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    weight_bytes: int
    peak_bytes: int
    captured: bool = False
    eager_reason: str | None = None


def measure_generation(
    model: Any, prompt_tokens: int, new_tokens: int, repeats: int = 3, *, compiled: bool = False
) -> GenerationSpeed:
    """Write ``new_tokens`` after a random prompt, greedily, several times; the first time is not counted.

    Args:
        model: a Hugging Face causal language model in evaluation mode.
        prompt_tokens: length of the prompt.
        new_tokens: at least 2.
        repeats: runs that count.
        compiled: on a GPU compile the step before it is captured.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    firsts, steps, reasons = [], [], list[str]()
    for run in range(repeats + 1):
        times = _token_times(model, prompt, new_tokens, compiled, reasons.append)
        if run:
            firsts.append(times[0])
            steps.extend(times[1:])
    return GenerationSpeed(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        first_token_seconds=statistics.median(firsts),
        tokens_per_second=1 / statistics.median(steps),
        weight_bytes=weight_bytes(model),
        peak_bytes=torch.cuda.max_memory_allocated(model.device) if on_gpu else psutil.Process().memory_info().rss,
        captured=on_gpu and all("cannot be compiled" in reason for reason in reasons),
        eager_reason=reasons[0] if reasons else None,
    )


def _token_times(
    model: Any, prompt: torch.Tensor, new_tokens: int, compiled: bool, on_fallback: Callable[[str], None]
) -> list[float]:
    times, before = [], time.perf_counter()
    uniform = torch.zeros(1, new_tokens, dtype=torch.float64)
    # every token comes to the CPU
    for _ in decode_steps(model, prompt, uniform, temperature=0, compiled=compiled, on_fallback=on_fallback):
        now = time.perf_counter()
        times.append(now - before)
        before = now
    return times
