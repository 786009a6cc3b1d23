"""Log-likelihoods where memory runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calib.errors import NumericalError, UsageError
from evals.inference.batching import BatchSize
from evals.inference.logits import Run
from evals.tasks.loglikelihood import score_requests
from tests.evals.tasks.test_loglikelihood import (
    CPU,
    MODEL,
    Counting,
    auto,
    choices,
    near,
    slow,
    source_of,
    tokens,
)
from tests.support.tiny_models import tiny_model


class Tight(Counting):
    """Runs out of memory above a number of tokens; ``accidents`` counts how often."""

    most = 10**9
    accidents = 0

    def run(self, ids: torch.Tensor, **inputs: Any) -> Run:
        if ids.numel() > self.most:
            self.accidents += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return super().run(ids, **inputs)


@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.parametrize("size", ["auto", 9])
def test_out_of_memory_halves_the_batch_and_changes_nothing(family: str, size: str | int) -> None:
    model = tiny_model(family)
    source = source_of(model, Tight)
    assert isinstance(source, Tight)
    source.most = 40  # three prompts do not fit, nor do two whole questions; two prompts do
    questions = [choices(tokens(i, 16), [tokens(i + 20, 2), tokens(i + 40, 3)]) for i in range(9)]
    batch = BatchSize(size, CPU)
    done: list[int] = []
    found = score_requests(source, questions, batch, done.append)
    assert near(found, slow(model, questions))
    assert source.accidents > 0
    assert batch.notes
    assert all("out of memory with a batch of" in note and "went on with half of it" in note for note in batch.notes)
    assert done[-1] == 9
    assert done == sorted(set(done))
    before = source.accidents
    score_requests(source, questions, batch)
    assert source.accidents - before <= 1  # it remembers; only the trial at the start may be too large


def test_a_question_that_does_not_fit_by_itself_is_an_error() -> None:
    source = source_of(MODEL, Tight)
    assert isinstance(source, Tight)
    source.most = 10
    with pytest.raises((torch.OutOfMemoryError, NumericalError)):
        score_requests(source, [choices(tokens(1, 30), [tokens(2, 3), tokens(3, 3)])], auto())


@pytest.mark.parametrize("size", ["0", 0, "-1", "many", "", "1.5", "²"])
def test_batch_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(UsageError, match="the batch size must be a number of at least 1 or 'auto'"):
        BatchSize(size, CPU)
