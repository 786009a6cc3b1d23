"""Few-shot examples: one fixed set per task, or per subject, so that every prompt begins with the same tokens.

Where examples come from rows that are scored themselves, one more is drawn than asked for, and a row that is among
them gets the others.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from calib.errors import UsageError
from evals.tasks.prompts import PromptedExample

__all__ = ["SEPARATOR", "FewshotExamples", "prefixes"]

SEPARATOR = "\n\n"


@dataclasses.dataclass(frozen=True)
class FewshotExamples:
    """Where examples are taken from.

    Args:
        pool: the candidates; ``None`` for the scored rows themselves.
        first: in order instead of drawn.
        source: what to call it.
    """

    pool: tuple[PromptedExample, ...] | None
    first: bool
    source: str


def prefixes(rows: Sequence[PromptedExample], examples: FewshotExamples, count: int, seed: int, name: str) -> list[str]:
    """What stands before each question.

    Args:
        rows: that are scored, all of them, whatever is taken of them later.
        examples: where to take examples from.
        count: of examples, at least 1.
        seed: of the draws.
        name: of the task; other tasks draw otherwise.

    Returns:
        As many as rows, each with ``count`` examples, all of the row's subject if the pool has subjects.

    Raises:
        UsageError: more examples asked for than there are.
    """
    subjects = {row.subject for row in rows}
    drawn = {
        subject: _draw(rows, examples, count, random.Random(f"{seed}:{name}:{subject}"), subject)
        for subject in subjects
    }
    return [drawn[row.subject](row) for row in rows]


def _draw(
    rows: Sequence[PromptedExample],
    examples: FewshotExamples,
    count: int,
    generator: random.Random,
    subject: str | None,
) -> Callable[[PromptedExample], str]:
    """The function of a row to its prefix, for the rows of one subject."""
    own = examples.pool is None
    pool = _of_subject(rows if examples.pool is None else examples.pool, subject)
    needed = count + 1 if own else count
    if len(pool) < needed:
        of = "" if subject is None else f" of the subject {subject!r}"
        but = " besides the asked one" if own else ""
        raise UsageError(
            f"{count} examples are asked for, but there are {len(pool) - own} rows{of} in {examples.source}{but}; "
            "ask for fewer."
        )
    chosen = pool[:needed] if examples.first else generator.sample(pool, needed)
    if not own:
        text = _join(chosen)
        return lambda row: text
    return lambda row: _join([example for example in chosen if example is not row][:count])


def _of_subject(pool: Sequence[PromptedExample], subject: str | None) -> list[PromptedExample]:
    if subject is None or all(example.subject is None for example in pool):
        return list(pool)
    return [example for example in pool if example.subject == subject]


def _join(examples: Sequence[PromptedExample]) -> str:
    return "".join(example.example + SEPARATOR for example in examples)
