"""Log-likelihoods of continuations, with what the answers of a question share computed once.

The answers of a question begin with the same tokens: its context, and often more. A batch of questions runs these
prefixes once and keeps their keys and values; then the rests of all answers run on copies of them. What all questions
begin with, such as examples, is run once for all of them. Prefixes are padded on the left and rests on the right, so
the tokens of a sequence stand side by side and windows of attention see what they should. The head runs only at
positions whose predictions are asked for.

Not every model can be run in two steps (recurrent states, positions counted from the padding, remote code). So at the
start a few questions are scored in both ways; where they differ, every sequence is run whole, padded on the right,
which any causal model bears, and the notes say so.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calib.errors import NumericalError
from evals.inference.batching import BatchSize, is_out_of_memory, run_batches
from evals.inference.logits import ModelLogits, Run
from evals.tasks.requests import Request, shared_prefix

__all__ = ["Answer", "score_requests"]

_PROBED = 3  # questions that are scored in both ways at the start
# Nats a token that two ways of one model may differ by on average; an answer by itself may by four times as much.
_NEAR = {torch.float32: 1e-3, torch.float64: 1e-3}
_NEAR_IN_HALF = 0.2  # logits of 16 to 32 are rounded to an eighth there
_PADDING = {"cpu": 128}  # tokens of padding in a batch of rests that are worth one forward pass less
_DEVICE_PADDING = 16384
_COMMON = 64  # tokens that several questions must begin with to have them run once
_CACHED = 4  # tokens whose keys and values are copied weigh as much as one that is computed
Done = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Answer:
    """``ll``: sum of ``ln p`` over the continuation, in nats. ``greedy``: whether the model would write just that."""

    ll: float
    greedy: bool


def score_requests(
    source: ModelLogits,
    questions: Sequence[Sequence[Request]],
    size: BatchSize,
    progress: Done | None = None,
) -> list[list[Answer]]:
    """Log-likelihoods of every request of every question, in order.

    Args:
        source: the model.
        questions: the requests of one question may share a beginning.
        size: questions in a batch.
        progress: called with the number of questions done.

    Raises:
        NumericalError: a score is NaN or infinite.
    """
    two_steps = source.two_steps
    if two_steps is None:
        two_steps, settled = _can_share(source, questions)
        source.two_steps = two_steps if settled else None
    found: dict[int, list[Answer]] = {}
    families = _families(questions) if two_steps else [(0, list(range(len(questions))))]
    for common, members in families:
        start = _run_start(source, questions[members[0]][0].shown[:common]) if common else None

        def work(batch: list[int], start: _Start | None = start, members: list[int] = members) -> None:
            chosen = [questions[members[place]] for place in batch]
            answers = _shared(source, chosen, start) if two_steps else _whole(source, chosen)
            for place, scores in zip(batch, answers, strict=True):
                _require_finite(scores, members[place])
                question = questions[members[place]]
                first = [question.index(request) for request in question]  # equal answers: no rounding between them
                found[members[place]] = [scores[number] for number in first]

        before = len(found)
        step = None if progress is None else functools.partial(_report, progress, before)
        lengths = [shared_prefix([request.shown for request in questions[i]]) - common for i in members]
        costs = [_cost(questions[i]) - common + common // _CACHED for i in members]
        run_batches(lengths, work, size, step, costs=costs)
    return [found[index] for index in range(len(questions))]


def _report(progress: Done, before: int, done: int) -> None:
    progress(before + done)


def _cost(question: Sequence[Request]) -> int:
    """Tokens that a question puts into a batch."""
    prefix = shared_prefix([request.shown for request in question])
    return prefix + sum(len(request.shown) - prefix for request in question)


def _can_share(source: ModelLogits, questions: Sequence[Sequence[Request]]) -> tuple[bool, bool]:
    """Whether running in two steps gives what running whole gives, and whether that is so for all questions to come.

    It is, if the trial read from a cache behind padding. Where memory runs out, the longest question is left out.
    """
    chosen = _telling(questions)
    while True:
        try:
            reason = _trial(source, chosen)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(chosen) == 1:
                raise
            chosen = chosen[:-1]
    if reason is None:
        return True, all(map(_reads_cache, chosen)) and len(set(map(_prefix, chosen))) > 1
    note = f"{type(source.model).__name__}: every answer is run whole, prompts are not shared ({reason})"
    source.notes = (*source.notes, note) if note not in source.notes else source.notes
    return False, True


def _telling(questions: Sequence[Sequence[Request]]) -> list[Sequence[Request]]:
    """A few questions whose second pass reads what the first has kept; with the shortest and the longest prompt."""
    useful = [question for question in questions if _reads_cache(question)] or list(questions)
    order = sorted(useful, key=_prefix)
    steps = range(_PROBED)
    return [order[i] for i in sorted({round(step * (len(order) - 1) / (_PROBED - 1)) for step in steps})]


def _trial(source: ModelLogits, chosen: Sequence[Sequence[Request]]) -> str | None:
    """Why the two ways do not agree on these questions, or ``None``."""
    whole = [answers for question in chosen for answers in _whole(source, [question])]
    try:
        shared = _shared(source, chosen)
    except (AttributeError, TypeError, RuntimeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return type(error).__name__
    return _disagreement(chosen, whole, shared, _NEAR.get(source.dtype, _NEAR_IN_HALF))


def _prefix(question: Sequence[Request]) -> int:
    """Tokens that all answers of a question begin with."""
    return shared_prefix([request.shown for request in question])


def _reads_cache(question: Sequence[Request]) -> bool:
    return 0 < _prefix(question) < max(len(request.shown) for request in question)


def _disagreement(
    questions: Sequence[Sequence[Request]],
    whole: Sequence[Sequence[Answer]],
    shared: Sequence[Sequence[Answer]],
    near: float,
) -> str | None:
    flat = [request for question in questions for request in question]
    pairs = zip([a for one in whole for a in one], [b for other in shared for b in other], strict=True)
    apart = [abs(a.ll - b.ll) / (len(request.ids) - request.first) for request, (a, b) in zip(flat, pairs, strict=True)]
    mean, most = sum(apart) / len(apart), max(apart)
    if mean <= near and most <= 4 * near:
        return None
    return f"in two steps they differ by {mean:.2g} nats per token on average, by {most:.2g} at most"


@dataclasses.dataclass(frozen=True)
class _Start:
    """Tokens that all questions of a family begin with (the examples in front of them), and their keys and values."""

    tokens: int
    cache: Any


def _families(questions: Sequence[Sequence[Request]]) -> list[tuple[int, list[int]]]:
    """Questions that begin with the same tokens, and how many these are; 0 for those that are on their own."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(question[0].shown[:_COMMON], []).append(index)
    found, alone = [], []
    for members in groups.values():
        flat = [request for index in members for request in questions[index]]
        prefixes = [shared_prefix([request.shown for request in questions[index]]) for index in members]
        common = min(shared_prefix([r.shown for r in flat]), min(r.first for r in flat) - 1, min(prefixes) - 1)
        if len(members) > 1 and common >= _COMMON:
            found.append((common, members))
        else:
            alone += members
    return [*found, (0, alone)] if alone else found


def _run_start(source: ModelLogits, tokens: Sequence[int]) -> _Start:
    return _Start(len(tokens), source.run(torch.tensor([list(tokens)]), use_cache=True).cache)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Predictions asked of one forward pass: for pair ``i`` the token ``target[i]`` at flat position ``place[i]``."""

    place: list[int] = dataclasses.field(default_factory=list)
    target: list[int] = dataclasses.field(default_factory=list)
    request: list[int] = dataclasses.field(default_factory=list)

    def add(self, place: int, target: int, request: int) -> None:
        self.place.append(place)
        self.target.append(target)
        self.request.append(request)


def _whole(source: ModelLogits, questions: Sequence[Sequence[Request]]) -> list[list[Answer]]:
    """Every sequence by itself, padded on the right."""
    flat = [request for question in questions for request in question]
    longest = max(len(request.shown) for request in flat)
    wanted = _Wanted()
    for row, request in enumerate(flat):
        for place in range(request.first - 1, len(request.shown)):
            wanted.add(row * longest + place, request.ids[place + 1], row)
    ids = torch.tensor([_right(request.shown, longest) for request in flat])
    totals = _Totals(len(flat))
    totals.add(source, source.run(ids), wanted)
    return totals.grouped(questions)


def _shared(
    source: ModelLogits, questions: Sequence[Sequence[Request]], start: _Start | None = None
) -> list[list[Answer]]:
    """Prefixes once, then the rests of all answers on the prefixes' keys and values.

    Behind a start there is no padding between it and what follows: prefixes of one length go together.
    """
    if start is None:
        return _two_steps(source, questions, None)
    lengths: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        lengths.setdefault(shared_prefix([request.shown for request in question]), []).append(index)
    found: dict[int, list[Answer]] = {}
    for indices in lengths.values():
        found.update(zip(indices, _two_steps(source, [questions[i] for i in indices], start), strict=True))
    return [found[index] for index in range(len(questions))]


def _two_steps(source: ModelLogits, questions: Sequence[Sequence[Request]], start: _Start | None) -> list[list[Answer]]:
    """`_shared` for prefixes that may be padded together."""
    done = 0 if start is None else start.tokens
    prefixes = [shared_prefix([request.shown for request in question]) for question in questions]
    flat = [(row, request) for row, question in enumerate(questions) for request in question]
    width = max(prefixes) - done
    if width == 0:  # no question's answers have a token in common
        return _whole(source, questions)
    wanted = _Wanted()
    for index, (row, request) in enumerate(flat):
        left = row * width + width - prefixes[row]  # of the flattened batch, less the tokens before it
        for place in range(request.first - 1, prefixes[row]):
            wanted.add(left + place, request.ids[place + 1], index)
    rests = [i for i, (row, request) in enumerate(flat) if len(request.shown) > prefixes[row]]
    ids, mask = _left([question[0].shown[done:n] for question, n in zip(questions, prefixes, strict=True)], width)
    inputs: dict[str, Any] = {"use_cache": bool(rests)}
    if start is not None:
        mask = torch.cat([torch.ones(len(mask), done, dtype=mask.dtype), mask], dim=1)
        cache = _copy(start.cache)
        cache.batch_select_indices(torch.zeros(len(questions), dtype=torch.int64, device=source.device))
        inputs = {"use_cache": True, "cache": cache}
    totals = _Totals(len(flat))
    run = source.run(ids, **_inputs(source, mask, done, width) | inputs)
    totals.add(source, run, wanted)
    rests.sort(key=lambda i: prefixes[flat[i][0]] - len(flat[i][1].shown))  # long ones first
    while rests:
        lengths = [len(flat[i][1].shown) - prefixes[flat[i][0]] for i in rests]
        count = _alike(lengths, _PADDING.get(source.device.type, _DEVICE_PADDING))
        _run_rests(source, run.cache, mask, flat, prefixes, rests[:count], totals, last=count == len(rests))
        rests = rests[count:]
    return totals.grouped(questions)


def _run_rests(
    source: ModelLogits,
    cache: Any,
    mask: Tensor,
    flat: Sequence[tuple[int, Request]],
    prefixes: Sequence[int],
    chosen: Sequence[int],
    totals: _Totals,
    *,
    last: bool,
) -> None:
    """What follows the prefixes, for requests ``chosen`` of about equal lengths."""
    rows = [flat[i][0] for i in chosen]
    rests = [flat[i][1].shown[prefixes[flat[i][0]] :] for i in chosen]
    longest = len(rests[0])
    wanted = _Wanted()
    for line, (index, rest) in enumerate(zip(chosen, rests, strict=True)):
        row, request = flat[index]
        start = max(0, request.first - 1 - prefixes[row])  # predictions before that were made with the prefix
        for place in range(start, len(rest)):
            wanted.add(line * longest + place, request.ids[prefixes[row] + place + 1], index)
    ids = torch.tensor([_right(rest, longest) for rest in rests])
    real = torch.tensor([[1] * len(rest) + [0] * (longest - len(rest)) for rest in rests])
    whole = torch.cat([mask[rows], real], dim=1)
    own = cache if last else _copy(cache)
    own.batch_select_indices(torch.tensor(rows, device=source.device))
    inputs = _inputs(source, whole, mask.shape[1], longest)
    totals.add(source, source.run(ids, cache=own, **inputs | {"use_cache": True}), wanted)


class _Totals:
    """Sums over the tokens of every request."""

    def __init__(self, requests: int) -> None:
        self._ll = torch.zeros(requests, dtype=torch.float64)
        self._misses = torch.zeros(requests, dtype=torch.int64)

    def add(self, source: ModelLogits, run: Run, wanted: _Wanted) -> None:
        """Predictions of one pass; each position's logits are made once, however many ask for it."""
        places, which = torch.unique(torch.tensor(wanted.place), return_inverse=True)
        targets, requests = torch.tensor(wanted.target), torch.tensor(wanted.request)
        order = which.argsort(stable=True)
        which, targets, requests = which[order], targets[order], requests[order]
        for start in range(0, len(places), source.rows):
            stop = min(start + source.rows, len(places))
            low, high = torch.searchsorted(which, torch.tensor([start, stop])).tolist()
            logits = run.logits(places[start:stop].to(source.device)).float()  # [rows, vocab]
            rows = (which[low:high] - start).to(source.device)
            asked = targets[low:high].to(source.device)
            log_p = torch.log_softmax(logits, dim=-1)[rows, asked]  # rounds as lm-evaluation-harness does
            missed = logits.argmax(dim=-1)[rows] != asked
            self._ll.index_add_(0, requests[low:high], log_p.double().cpu())
            self._misses.index_add_(0, requests[low:high], missed.long().cpu())

    def grouped(self, questions: Sequence[Sequence[Request]]) -> list[list[Answer]]:
        pairs = zip(self._ll.tolist(), self._misses.tolist(), strict=True)
        answers = iter([Answer(ll, misses == 0) for ll, misses in pairs])
        return [[next(answers) for _ in question] for question in questions]


def _inputs(source: ModelLogits, mask: Tensor, start: int, count: int) -> dict[str, Any]:
    """Mask and positions of the columns from ``start`` on, ``count`` of them; neither where nothing is padded."""
    if bool(mask.all()):
        return {}
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, start : start + count]
    return {"attention_mask": mask.to(source.device), "position_ids": positions.to(source.device)}


def _alike(lengths: Sequence[int], allowed: int) -> int:
    """How many of these lengths, long ones first, can share a batch with no more padding than ``allowed``."""
    padding = 0
    for count, length in enumerate(lengths):
        padding += lengths[0] - length
        if padding > allowed:
            return count
    return len(lengths)


def _copy(cache: Any) -> Any:
    """A cache of its own over the same tensors: selecting rows and appending make new ones."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _left(sequences: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[batch, width]``, padded on the left with the first token."""
    ids = torch.tensor([[*[ids[0] if ids else 0] * (width - len(ids)), *ids] for ids in sequences])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences])
    return ids, mask


def _right(ids: Sequence[int], width: int) -> list[int]:
    return [*ids, *[ids[-1]] * (width - len(ids))]


def _require_finite(answers: Sequence[Answer], question: int) -> None:
    for number, answer in enumerate(answers):
        if not abs(answer.ll) < float("inf"):
            raise NumericalError(
                f"the score of answer {number} to question {question} is {answer.ll}: the model's logits are not "
                "finite. Try --dtype float32; if that does not help, the checkpoint is damaged."
            )
