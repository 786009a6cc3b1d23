"""Scores of ``ptq eval`` in the model card of the folder that was measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.record import Record, TaskResult, TextResult
from ptq.errors import OutputError
from ptq.model_card import CARD_NAME, ScoreRow, card_is_ours, insert_scores, public_source
from ptq.report import REPORT_NAME

__all__ = ["add_to_card"]


def add_to_card(source: str, record: Record) -> str | None:
    """Put the scores into the card of a result of ptq; of other models, nothing is written.

    Args:
        source: what was measured.
        record: its evaluation.

    Returns:
        A sentence for the user, or ``None`` where there is no card of ptq.
    """
    card = Path(source) / CARD_NAME
    try:
        if not (Path(source) / REPORT_NAME).is_file() or not card.is_file() or not card_is_ours(card.parent):
            return None
        changed = insert_scores(card, score_rows(record))
    except OutputError as error:  # a folder for reading only is no reason to fail after the work
        return f"the scores are not in the model card: {error}"
    return f"scores are in {card} (--no-card leaves it as it is)" if changed else None


def score_rows(record: Record) -> Iterator[ScoreRow]:
    """Every score with its standard error, how it was measured, and the base's."""
    where = str(record.environment["dtype"])
    base = record.base
    for text in record.texts:
        before, name = None if base is None else _same(base.texts, text), public_source(text.name)
        measured = (
            f"{text.convention}, up to {text.settings['seqlen']} tokens, {text.tokens:,} scored{_bos(text)}, {where}"
        )
        base_score = "" if not isinstance(before, TextResult) else _perplexity(before)
        yield ScoreRow(f"{name}, perplexity", measured, _perplexity(text), base_score)
        if text.divergence is not None:
            found = text.divergence
            yield ScoreRow(
                f"{name}, KL(base, this) in nats per token",
                measured,
                f"{found.kl_mean:.5f}{_spread(found.kl_standard_error, '.5f')}",
            )
    for task in record.tasks:
        before = None if base is None else _same(base.tasks, task)
        measured = f"{len(task.items):,} rows, {task.settings.get('fewshot', 0)} shots, {where}"
        base_score = "" if not isinstance(before, TaskResult) else _accuracy(before)
        yield ScoreRow(f"{task.name}, {task.metric}", measured, _accuracy(task), base_score)
    yield from _harness(record.harness)


def _same(found: tuple[Any, ...], wanted: TextResult | TaskResult) -> Any:
    """The base's result of the same thing."""
    return next((one for one in found if (one.name, one.settings) == (wanted.name, wanted.settings)), None)


def _bos(text: TextResult) -> str:
    bos = text.settings.get("bos")
    return "" if bos is None else " after BOS" if bos else " without BOS"


def _perplexity(text: TextResult) -> str:
    if text.perplexity is None:
        return f"exp({text.mean_nll:.1f})"
    error = text.standard_error
    return f"{text.perplexity:.4f}{_spread(None if error is None else text.perplexity * error, '.4f')}"


def _accuracy(task: TaskResult) -> str:
    found = task.metrics[task.metric]
    return f"{found['value'] or 0:.2%}{_spread(found['standard_error'], '.2%')}"


def _spread(error: float | None, form: str) -> str:
    return "" if error is None else f" ± {error:{form}}"


def _harness(found: dict[str, Any] | None) -> Iterator[ScoreRow]:
    """Rows of lm-evaluation-harness: every metric that has a standard error of its own beside it."""
    results = {} if found is None else found.get("results")
    version = "" if found is None else str(found.get("harness_version", ""))
    for task, metrics in results.items() if isinstance(results, dict) else ():
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            metric, comma, kind = str(name).partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            spread = _spread(error if isinstance(error, float) else None, ".4f")
            yield ScoreRow(
                f"{task}, {metric} ({kind})", f"lm-evaluation-harness {version}".strip(), f"{value:.4f}{spread}"
            )
