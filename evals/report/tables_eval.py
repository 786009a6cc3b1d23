"""Tables of a page that come from records and from their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals.comparison.conclusions import figure, in_points, p_words
from evals.comparison.types import Comparison, Difference
from evals.record import Divergence, Record, TaskResult, TextResult
from evals.report.html import Html, bullets, data_list, details, marked, table

__all__ = [
    "candidate_table",
    "certificate",
    "conclusion_table",
    "difference_tables",
    "harness_table",
    "megabytes",
    "task_tables",
    "text_tables",
    "with_error",
]

_PLUS_MINUS = " \N{PLUS-MINUS SIGN} "


def megabytes(count: float) -> str:
    """Bytes as decimal megabytes."""
    return f"{count / 1e6:,.1f} MB"


def with_error(value: float | None, error: float | None, digits: int = 4) -> str | None:
    """``value +- standard error`` with fixed decimals; ``None`` for none."""
    if value is None:
        return None
    spread = "" if error is None else f"{_PLUS_MINUS}{error:.{digits}f}"
    return f"{value:,.{digits}f}{spread}"


def text_tables(records: Sequence[Record], labels: Sequence[str]) -> list[Html]:
    """Perplexities by text, each convention under its own name; then the divergences."""
    rows = [(label, text) for label, record in zip(labels, records, strict=True) for text in record.texts]
    tables = []
    for target in dict.fromkeys(text.name for _, text in rows):
        chosen = [(label, text) for label, text in rows if text.name == target]
        tables.append(_perplexity_table(target, chosen))
        if any(text.divergence for _, text in chosen):
            tables.append(_divergence_table(target, chosen))
    return tables


def _perplexity_table(target: str, rows: Sequence[tuple[str, TextResult]]) -> Html:
    figures = ("perplexity", "\N{PLUS-MINUS SIGN} SE", "per word", "per byte", "bits per byte")
    headings = ("model", "convention", *figures, "tokens", "words", "bytes")
    cells = [(label, _convention(text), *_perplexity_cells(text)) for label, text in rows]
    return table(f"Perplexity on {target}", headings, cells, words=(0, 1))


def _perplexity_cells(text: TextResult) -> tuple[str | None, ...]:
    ppl, error = text.perplexity, text.standard_error
    spread = None if ppl is None or error is None else f"{ppl * error:.4f}"
    shown = f"exp({text.mean_nll:.1f})" if ppl is None else f"{ppl:,.4f}"
    others = (text.word_perplexity, text.byte_perplexity, text.bits_per_byte)
    counts = (text.tokens, text.words, text.bytes)
    return (
        shown,
        spread,
        *(None if value is None else f"{value:,.4f}" for value in others),
        *(None if count is None else f"{count:,}" for count in counts),
    )


def _convention(text: TextResult) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in text.settings.items() if isinstance(value, (int, str)))
    return f"{text.convention}: {settings}" if settings else text.convention


def _divergence_table(target: str, rows: Sequence[tuple[str, TextResult]]) -> Html:
    quantiles = ("median", "99 %", "99.9 %", "max")
    change = "RMS change of p"
    headings = (
        "model",
        "convention",
        "KL, nats per token",
        "exactly in",
        *quantiles,
        "top-1",
        "ln (ppl / base's)",
        change,
    )
    cells = []
    for label, text in rows:
        found = text.divergence
        if found is None:
            continue
        tail = (found.kl_median, found.kl_p99, found.kl_p999, found.kl_max)
        cells.append(
            (
                label,
                text.convention,
                with_error(found.kl_mean, found.kl_standard_error, 5),
                _bounds(found),
                *(f"{value:.4g}" for value in tail),
                _percent(found.top1_agreement, found.top1_standard_error),
                with_error(found.log_ratio, found.log_ratio_standard_error, 5),
                f"{100 * found.dp_rms:.2f} %",
            )
        )
    return table(f"Divergence from the base on {target}", headings, cells, words=(0, 1))


def _bounds(found: Divergence) -> str | None:
    """Where the exact mean is, whatever the cache of the base left out."""
    if found.kl_low is None or found.kl_high is None:
        return None
    return "all kept" if found.top_k is None else f"{found.kl_low:.4g} to {found.kl_high:.4g}"


def _percent(value: float, error: float | None) -> str:
    spread = "" if error is None else f"{_PLUS_MINUS}{100 * error:.2f}"
    return f"{100 * value:.2f}{spread} %"


def task_tables(records: Sequence[Record], labels: Sequence[str]) -> list[Html]:
    """The customary metric of every task, models side by side; then every metric, folded."""
    rows = [(label, task) for label, record in zip(labels, records, strict=True) for task in record.tasks]
    if not rows:
        return []
    short, long = [], []
    for name in dict.fromkeys(task.name for _, task in rows):
        for label, task in rows:
            if task.name != name:
                continue
            shots = task.settings.get("fewshot", 0)
            where = (label, f"{name}, {shots}-shot" if shots else name)
            for metric, found in task.metrics.items():
                cells = (*where, metric, *_metric_cells(metric, found), f"{len(task.items):,}")
                long.append(cells)
                if metric == task.metric:
                    chance = None if task.chance is None else f"{100 * task.chance:.1f}"
                    short.append((*cells[:-1], chance, cells[-1]))
    words = ("model", "task", "metric", "value", "\N{PLUS-MINUS SIGN} SE")
    first = table("Tasks, customary metric, in percent", (*words, "chance", "rows"), short, words=(0, 1, 2))
    every = table("Every metric; shares in percent, ll_gold in nats", (*words, "rows"), long, words=(0, 1, 2))
    return [first, details("Every metric of every task", every, long=True)]


def _metric_cells(metric: str, found: dict[str, float | None]) -> tuple[str | None, str | None]:
    factor, digits = (100.0, 2) if in_points(metric) else (1.0, 4)
    value, error = found["value"], found["standard_error"]
    return (
        None if value is None else f"{factor * value:.{digits}f}",
        None if error is None else f"{factor * error:.{digits}f}",
    )


def candidate_table(comparison: Comparison) -> Html:
    """Who is compared: size, bits, seeds."""
    headings = ("model", "weights", "bits per weight", "calibration seeds", "files")
    rows = [
        (
            f"{c.label} (reference)" if place == 0 else c.label,
            megabytes(c.bytes),
            None if c.bits_per_weight is None else f"{c.bits_per_weight:.3f}",
            ", ".join(str(seed) for seed in c.seeds if seed is not None) or None,
            ", ".join(c.sources),
        )
        for place, c in enumerate(comparison.candidates)
    ]
    return table("Compared", headings, rows, words=(0, 3, 4))


def conclusion_table(comparison: Comparison) -> Html:
    """Texts and tasks by candidates: the difference from the reference, and whether it is significant."""
    reference, *others = comparison.candidates
    chosen = [d for d in comparison.differences if d.headline and d.reference == reference.label]
    targets = dict.fromkeys((d.target, d.measure) for d in chosen)
    found = {(d.target, d.measure, d.candidate): d for d in chosen}
    rows = [
        (", ".join(target), *(_conclusion(found.get((*target, candidate.label))) for candidate in others))
        for target in targets
    ]
    headings = ("on", *(candidate.label for candidate in others))
    return (
        table(f"Difference from {reference.label}; shares in percentage points", headings, rows) if rows else Html("")
    )


def _conclusion(found: Difference | None) -> Html | None:
    if found is None:
        return None
    shown = figure(found, found.difference, sign=True)
    word = _conclusion_word(found)
    return marked(f"{shown} {word}", {"better": "better", "worse": "worse"}.get(word or "", "not-significant"))


def difference_tables(comparison: Comparison) -> list[Html]:
    """Headline differences from the reference; then other pairs and other measures, folded."""
    reference = comparison.candidates[0].label
    first = [d for d in comparison.differences if d.headline and d.reference == reference]
    pairs = [d for d in comparison.differences if d.headline and d.reference != reference]
    others = [d for d in comparison.differences if not d.headline and d.reference == reference]
    tables = [_difference_table(f"Paired differences from {reference}", first, comparison)] if first else []
    for summary, chosen in (
        ("Paired differences between the others", pairs),
        (f"Other measures, from {reference}", others),
    ):
        if chosen:
            tables.append(
                details(f"{summary} ({len(chosen)})", _difference_table(summary, chosen, comparison), long=True)
            )
    return tables


def _difference_table(caption: str, rows: Sequence[Difference], comparison: Comparison) -> Html:
    level = f"{100 * comparison.confidence:.4g} % interval"
    changes = ("lost / won", "answers changed")
    headings = ("model", "on", "measure", "conclusion", "difference", level, "p", "p, Holm", *changes, "detectable")
    reference = comparison.candidates[0].label
    cells = [_difference_cells(row, reference) for row in rows]
    return table(f"{caption}; shares in percentage points", headings, cells, words=(0, 1, 2, 3))


def _difference_cells(row: Difference, reference: str) -> tuple[str | None, ...]:
    def shown(value: float | None, sign: bool = False) -> str | None:
        return None if value is None else figure(row, value, sign=sign)

    whom = row.candidate if row.reference == reference else f"{row.candidate} minus {row.reference}"
    interval = None
    if row.low is not None and row.high is not None:
        interval = f"{shown(row.low, True)} to {shown(row.high, True)}"
    spread = "" if row.standard_error is None else f"{_PLUS_MINUS}{shown(row.standard_error)}"
    flips = row.flips
    return (
        whom,
        row.target,
        row.measure,
        _conclusion_word(row),
        f"{shown(row.difference, True)}{spread}",
        interval,
        _p(row.p_value),
        _p(row.p_adjusted),
        None if flips is None else f"{flips.lost:.4g} / {flips.won:.4g} of {row.items:,}",
        None if flips is None else f"{100 * flips.answers_changed:.1f} %",
        shown(row.detectable),
    )


def _conclusion_word(row: Difference) -> str | None:
    if not row.headline:
        return None
    return "n.s." if row.conclusion == "not significant" else row.conclusion


def _p(value: float | None) -> str | None:
    return None if value is None else p_words(value).removeprefix("p ").removeprefix("= ")


def harness_table(records: Sequence[Record], labels: Sequence[str]) -> Html:
    """Results of lm-evaluation-harness, as it gives them."""
    rows = [
        (label, task, metric, f"{value:.6g}" if isinstance(value, float) else value)
        for label, record in zip(labels, records, strict=True)
        for task, metrics in _mapping((record.harness or {}).get("results")).items()
        for metric, value in _mapping(metrics).items()
        if isinstance(value, (int, float))
    ]
    if not rows:
        return Html("")
    return table("lm-evaluation-harness", ("model", "task", "metric", "value"), rows, words=(0, 1, 2))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def certificate(record: Record, label: str) -> Html:
    """Everything that a record knows of its origin, folded, with its notes."""
    model = record.model
    data = {
        "model": model.source,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "bytes": model.bytes,
        "bits per weight": model.bits_per_weight,
        "fingerprint": model.fingerprint,
        "date": record.date,
        "seconds": record.seconds,
        "tokenizer": record.tokenizer_hash,
        "recipe": model.recipe or {},
        "calibration": model.calibration or {},
        "environment": record.environment,
        "base": record.base.model.fingerprint if record.base else None,
        **{f"text {t.name} ({t.convention})": _origin(t.source, t.sha256, t.items.fingerprint) for t in record.texts},
        **{f"task {t.name}": _origin(t.source, None, t.items.fingerprint) | t.settings for t in record.tasks},
        "harness": {k: v for k, v in (record.harness or {}).items() if k not in ("results", "groups")},
    }
    results: list[TextResult | TaskResult] = [*record.texts, *record.tasks]
    notes = [*record.notes, *(f"{result.name}: {note}" for result in results for note in result.notes)]
    return details(label, data_list(data), bullets(notes) if notes else "")


def _origin(source: str, sha256: str | None, items: str) -> dict[str, Any]:
    return {"source": source, "sha256": sha256, "items": items}
