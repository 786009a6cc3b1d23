"""Windows of a text -> scores of its tokens, alone or against what is kept of a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from calib.errors import NumericalError
from evals.batching import BatchSize, run_batches
from evals.logits import LogitSource
from evals.reference import Kept, Scores, join, keep, score_against, score_alone
from evals.windows import Window

__all__ = ["Base", "keep_base", "score_windows"]

Done = Callable[[int], None]


class Base(Protocol):
    """Where the base's predictions come from."""

    def window(self, index: int) -> Kept:
        """What was kept at the scored positions of a window, on the CPU."""
        ...


def score_windows(
    source: LogitSource,
    windows: Sequence[Window],
    size: BatchSize,
    *,
    base: Base | None = None,
    progress: Done | None = None,
) -> list[Scores]:
    """Scores of the scored tokens of every window, in the order of the windows.

    Raises:
        ModelError: the base has another vocabulary.
        NumericalError: a score is NaN or infinite.
    """
    found: dict[int, Scores] = {}

    def work(batch: list[int]) -> None:
        ids, scored, targets = _stack([windows[index] for index in batch])
        kept = None if base is None else join([base.window(index) for index in batch])
        parts = []
        for place, logits in source.chunks(ids, scored=scored):
            wanted = targets[place].to(logits.device)
            if kept is None:
                parts.append(score_alone(logits, wanted))
            else:
                parts.append(score_against(logits, wanted, kept.part(place, logits.device)))
        for index, scores in zip(batch, _split(join(parts), [windows[i].scored for i in batch]), strict=True):
            _require_finite(scores, index)
            found[index] = scores

    run_batches([len(window.ids) for window in windows], work, size, progress)
    return [found[index] for index in range(len(windows))]


def keep_base(
    source: LogitSource,
    windows: Sequence[Window],
    size: BatchSize,
    *,
    top_k: int | None,
    store: Callable[[int, Kept], None],
    progress: Done | None = None,
) -> None:
    """Run the base and hand on what is kept of it, window by window, on the CPU.

    Raises:
        NumericalError: a score is NaN or infinite.
    """

    generators: dict[torch.device, torch.Generator] = {}

    def work(batch: list[int]) -> None:
        ids, scored, targets = _stack([windows[index] for index in batch])
        parts = []
        for place, logits in source.chunks(ids, scored=scored):
            device = logits.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
            kept = keep(logits, targets[place].to(device), top_k, generator)
            parts.append(kept.part(slice(None), torch.device("cpu")))
        whole, start = join(parts), 0
        for index in batch:
            part = whole.part(slice(start, start + windows[index].scored), torch.device("cpu"))
            _require_finite(Scores(part.nll.double()), index)
            store(index, part)
            start += windows[index].scored

    run_batches([len(window.ids) for window in windows], work, size, progress)


def _stack(windows: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids ``[batch, longest]``, which targets ``[batch, longest - 1]`` are scored, and these targets ``[scored]``.

    Shorter windows are padded on the right with their last token: a causal model does not see it.
    """
    longest = max(len(window.ids) for window in windows)
    ids = torch.stack([torch.cat([w.ids, w.ids[-1:].expand(longest - len(w.ids))]) for w in windows])
    scored = torch.zeros(len(windows), longest - 1, dtype=torch.bool)
    for row, window in enumerate(windows):
        scored[row, window.first - 1 : len(window.ids) - 1] = True
    return ids, scored, ids[:, 1:][scored]


def _split(scores: Scores, counts: Sequence[int]) -> list[Scores]:
    names = [field.name for field in dataclasses.fields(Scores) if getattr(scores, field.name) is not None]
    parts = {name: torch.split(getattr(scores, name), list(counts)) for name in names}
    return [Scores(**{name: parts[name][index] for name in names}) for index in range(len(counts))]


def _require_finite(scores: Scores, window: int) -> None:
    named = ((scores.nll, "the model's score"), (scores.base_nll, "the base's score"), (scores.kl, "the divergence"))
    for values, what in named:
        if values is None or bool(torch.isfinite(values).all()):
            continue
        place = int((~torch.isfinite(values)).nonzero()[0])
        raise NumericalError(
            f"{what} of scored token {place} in window {window} is {values[place].item()}: the model's logits are not "
            "finite. Try --dtype float32; if that does not help, the checkpoint is damaged."
        )
