"""Windows of a text -> scores of its tokens, alone or against what is kept of a base."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from calib.errors import NumericalError
from evals.inference.batching import BatchSize, run_batches
from evals.inference.logits import LogitSource
from evals.texts.kl import Scores, TopKLogprobs, join, keep_top_k, put, reserve, score_against, score_alone
from evals.texts.windows import Window

__all__ = ["Base", "keep_base", "score_windows"]

Done = Callable[[int], None]


class Base(Protocol):
    """Where the base's predictions come from."""

    def window(self, index: int) -> TopKLogprobs:
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
        edges = _edges(windows, batch)
        kept = None if base is None else _BaseRows(base, batch, edges)
        room: Scores | None = None
        for place, logits in source.chunks(ids, scored=scored):
            wanted = targets[place].to(logits.device)
            if kept is None:
                part = score_alone(logits, wanted)
            else:
                part = score_against(logits, wanted, kept.at(place).part(slice(None), logits.device))
            room = reserve(part, len(targets)) if room is None else room
            put(room, place, part)
        assert room is not None  # a window scores at least one token
        for number, index in enumerate(batch):
            scores = room.part(slice(edges[number], edges[number + 1]))
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
    store: Callable[[int, TopKLogprobs], None],
    progress: Done | None = None,
) -> None:
    """Run the base and hand on what is kept of it, window by window, on the CPU.

    Raises:
        NumericalError: a score is NaN or infinite.
    """

    generators: dict[torch.device, torch.Generator] = {}

    def work(batch: list[int]) -> None:
        ids, scored, targets = _stack([windows[index] for index in batch])
        edges, room = _edges(windows, batch), None
        for place, logits in source.chunks(ids, scored=scored):
            device = logits.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
            kept = keep_top_k(logits, targets[place].to(device), top_k, generator)
            for number, rows in _pieces(edges, place):
                start, stop = edges[number], edges[number + 1]
                room = reserve(kept, stop - start) if room is None else room
                put(room, _shifted(rows, start), kept.part(_shifted(rows, place.start), torch.device("cpu")))
                if rows.stop == stop:
                    _require_finite(Scores(room.nll.double()), batch[number])
                    store(batch[number], room)
                    room = None

    run_batches([len(window.ids) for window in windows], work, size, progress)


class _BaseRows:
    """What was kept of a base for a batch of windows, one window in memory at a time.

    Args:
        base: where the windows are.
        batch: which windows, one behind the other.
        edges: where each begins, see `_edges`.
    """

    def __init__(self, base: Base, batch: Sequence[int], edges: Sequence[int]) -> None:
        self._base, self._batch, self._edges = base, batch, edges
        self._number = -1
        self._window: TopKLogprobs | None = None

    def at(self, place: slice) -> TopKLogprobs:
        """Rows ``place`` of the batch, on the CPU; they are asked for in order."""
        parts = []
        for number, rows in _pieces(self._edges, place):
            if number != self._number or self._window is None:
                self._number, self._window = number, self._base.window(self._batch[number])
            parts.append(self._window.part(_shifted(rows, self._edges[number]), torch.device("cpu")))
        return join(parts)


def _edges(windows: Sequence[Window], batch: Sequence[int]) -> list[int]:
    """Where the scored tokens of each window of a batch begin among those of all, and their number."""
    return [0, *itertools.accumulate(windows[index].scored for index in batch)]


def _pieces(edges: Sequence[int], place: slice) -> Iterator[tuple[int, slice]]:
    """The windows that ``place`` reaches into, by their number in the batch, and what of ``place`` lies in each."""
    number, start = bisect.bisect_right(edges, place.start) - 1, place.start
    while start < place.stop:
        stop = min(place.stop, edges[number + 1])
        yield number, slice(start, stop)
        number, start = number + 1, stop


def _shifted(rows: slice, start: int) -> slice:
    return slice(rows.start - start, rows.stop - start)


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
