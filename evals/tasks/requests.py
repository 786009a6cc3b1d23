"""A question -> token ids, cut at the seam of context and continuation exactly as lm-evaluation-harness does it.

Spaces at the end of the context move to the continuation; context and whole are tokenized, each with the special tokens
that the tokenizer adds by itself, and the continuation is what the whole has beyond the context's number of tokens.
Where a token runs over the seam so that nothing is beyond, the harness stops at an assertion; here the row is named.
What exceeds the model's context is cut on the left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from calib.errors import DataError
from evals.texts.windows import prefix_token

__all__ = ["Request", "encode_pairs", "shared_prefix"]

_AT_ONCE = 4096  # strings tokenized in one call


@dataclasses.dataclass(frozen=True)
class Request:
    """One continuation to score: ``ids[first:]`` given ``ids[:first]``; ``cut`` tokens were left out in front."""

    ids: tuple[int, ...]
    first: int
    cut: int = 0

    @property
    def shown(self) -> tuple[int, ...]:
        """What the model reads: its last token is only predicted."""
        return self.ids[:-1]


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, context: int, places: Sequence[str] | None = None
) -> list[Request]:
    """Requests of ``(context, continuation)`` pairs.

    Args:
        pairs: a context may be empty; then BOS or EOS stands in its place.
        tokenizer: of the model.
        context: tokens that the model can read.
        places: file and line of each pair, for messages.

    Raises:
        DataError: a continuation has no tokens, or more than the model can read.
    """
    moved = [_move_spaces(before, after) for before, after in pairs]
    strings = sorted({text for before, after in moved if before for text in (before, before + after)})
    ids = dict(zip(strings, _encode(strings, tokenizer), strict=True))
    requests = []
    for index, (before, after) in enumerate(moved):
        if before:
            head, tail = ids[before], ids[before + after][len(ids[before]) :]
        else:
            head, tail = _without_context(after, tokenizer)
        where = f"{places[index]}: " if places is not None and places[index] else ""
        requests.append(_request(head, tail, context, pairs[index], where))
    return requests


def shared_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all sequences begin with."""
    shortest, longest = min(sequences), max(sequences)  # in lexicographic order the two ends differ first
    most = min(len(shortest), len(longest))
    return next((i for i in range(most) if shortest[i] != longest[i]), most)


def _move_spaces(before: str, after: str) -> tuple[str, str]:
    if not before:
        return before, after
    kept = before.rstrip()
    return kept, before[len(kept) :] + after


def _encode(strings: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each; no special token is added to a string that begins with the prefix token's text."""
    prefix = str(tokenizer.decode(prefix_token(tokenizer)))
    found: dict[int, list[int]] = {}
    for special in (True, False):
        indices = [i for i, string in enumerate(strings) if string.startswith(prefix) is not special]
        options: dict[str, Any] = {} if special else {"add_special_tokens": False}
        for start in range(0, len(indices), _AT_ONCE):
            part = indices[start : start + _AT_ONCE]
            ids = tokenizer([strings[i] for i in part], return_attention_mask=False, verbose=False, **options)
            found.update(zip(part, ids["input_ids"], strict=True))
    return [found[i] for i in range(len(strings))]


def _without_context(after: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    prefix = prefix_token(tokenizer)
    ids: list[int] = tokenizer.encode(after, add_special_tokens=False)
    return ([prefix], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)


def _request(head: list[int], tail: list[int], context: int, pair: tuple[str, str], where: str) -> Request:
    if not tail:
        raise DataError(f"{where}{_without_tokens(*pair)}")
    if len(tail) > context:
        raise DataError(
            f"{where}the continuation {pair[1][:60]!r}... has {len(tail)} tokens, the model's context is {context}."
        )
    ids = (*head, *tail)
    cut = max(0, len(ids) - (context + 1))
    return Request(ids[cut:], len(head) - cut, cut)


def _without_tokens(before: str, after: str) -> str:
    """Why nothing of a continuation is left behind its context, and what to do."""
    if not before or not after.strip():
        return f"the continuation {after!r} after {_end(before)!r} has no tokens of its own; give it visible text."
    return (
        f"the continuation {after!r} after {_end(before)!r} has no tokens of its own: this tokenizer makes one token "
        "of it and the end of what stands before. Put the seam between two words: end the question before the word, or "
        'put a space between ("delimiter" in NAME.task.json).'
    )


def _end(text: str) -> str:
    return text if len(text) <= 40 else "..." + text[-40:]
