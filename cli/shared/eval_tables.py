"""A `Record` for people: one block per text, one table for the tasks."""

from __future__ import annotations

from rich.table import Table

from cli.shared.tables import size
from cli.shared.terminal.rows import Column, NamedRows
from cli.shared.terminal.screen import Screen
from evals.record import Divergence, Record, TaskResult, TextResult

__all__ = ["show"]


def show(record: Record, screen: Screen) -> None:
    """Print a record: model, texts, divergence, tasks, notes."""
    for block in (_head(record), *(_text(text, record) for text in record.texts)):
        screen.print(block, "")
    if record.tasks:
        screen.print(_tasks(record), "")
    if record.harness is not None:
        screen.print(_harness(record.harness), "")
    texts = [f"{text.name}: {note}" for text in record.texts for note in text.notes]
    tasks = [f"{task.name}: {note}" for task in record.tasks for note in task.notes]
    for note in dict.fromkeys((*record.notes, *texts, *tasks)):
        screen.print(f"note: {note}", style="yellow", soft_wrap=True)


def _block() -> Table:
    return Table(show_header=False, box=None, pad_edge=False)


def _head(record: Record) -> Table:
    table, model = _block(), record.model
    bits = "" if model.bits_per_weight is None else f", {model.bits_per_weight:.3f} bits per quantized weight"
    table.add_row("model", model.source)
    table.add_row("size", f"{size(model.bytes)}{bits}")
    if record.base is not None:
        table.add_row("base", f"{record.base.model.source}, {size(record.base.model.bytes)}")
    where = record.environment
    table.add_row("time", f"{record.seconds:.1f} s on {where['device']}, {where['dtype']}")
    return table


def _text(text: TextResult, record: Record) -> Table:
    table = _block()
    base = None if record.base is None else _same_text(record.base, text)
    counts = [f"{text.tokens:,} tokens"]
    counts += [f"{value:,} {name}" for name, value in (("words", text.words), ("bytes", text.bytes)) if value]
    table.add_row("text", f"{text.name}: {', '.join(counts)}")
    table.add_row(
        "convention",
        f"{text.convention}, {len(text.items)} {_unit(text)} of up to {text.settings['seqlen']}{_bos(text)}",
    )
    table.add_row("perplexity", _perplexity(text) + ("" if base is None else f"   (base {_perplexity(base)})"))
    if text.word_perplexity is not None:
        table.add_row("per word, per byte", f"{text.word_perplexity:.4f}, {text.byte_perplexity or 0:.4f}")
    if text.bits_per_byte is not None:
        table.add_row("bits per byte", f"{text.bits_per_byte:.4f}")
    for label, value in () if text.divergence is None else _divergence(text.divergence):
        table.add_row(label, value)
    return table


def _unit(text: TextResult) -> str:
    return {"documents": "documents, windows", "llamacpp": "chunks", "sliding": "windows"}.get(
        text.convention, "segments"
    )


def _bos(text: TextResult) -> str:
    """How windows begin, where that was a question."""
    bos = text.settings.get("bos")
    return "" if bos is None else ", each begins with BOS" if bos else ", without BOS"


def _same_text(base: Record, text: TextResult) -> TextResult | None:
    found = [t for t in base.texts if (t.name, t.convention, t.settings) == (text.name, text.convention, text.settings)]
    return found[0] if found else None


def _perplexity(text: TextResult) -> str:
    if text.perplexity is None:
        return f"exp({text.mean_nll:.1f})"
    error = text.standard_error
    spread = "" if error is None else f" +- {text.perplexity * error:.3f}"
    return f"{text.perplexity:.4f}{spread}"


def _divergence(found: Divergence) -> list[tuple[str, str]]:
    def spread(error: float | None, form: str = ".5f") -> str:
        return "" if error is None else f" +- {error:{form}}"

    tail = f"{found.kl_median:.5f} / {found.kl_p99:.4f} / {found.kl_p999:.4f} / {found.kl_max:.4f}"
    rows = [
        ("ln ratio", f"{found.log_ratio:.5f}{spread(found.log_ratio_standard_error)} (paired)"),
        ("KL(base || model)", f"{found.kl_mean:.5f}{spread(found.kl_standard_error)} nats per token"),
        ("KL median / 99 % / 99.9 % / max", tail),
        ("top-1 agreement", f"{found.top1_agreement:.2%}{spread(found.top1_standard_error, '.2%')}"),
        ("change of the true token's p", f"{found.dp_mean:+.4f} on average, {found.dp_rms:.4f} rms"),
    ]
    if found.top_k is not None:
        rows.append(
            ("kept of the base", f"{found.top_k} tokens and draws; they add {found.kl_draw_error:.1g} to KL's error")
        )
    return rows


def _tasks(record: Record) -> NamedRows:
    headings = ("rows", "metric", "value", "p(gold)", "chance")
    more = () if record.base is None else ("base", "lost / won", "answers changed")
    columns = tuple(Column(heading, left=heading == "metric") for heading in headings + more)
    return NamedRows("task", columns, tuple((task.name, *_task_cells(task, record.base)) for task in record.tasks))


def _task_cells(task: TaskResult, base: Record | None) -> list[str]:
    metrics = task.metrics
    shown = [name for name in dict.fromkeys(("acc", task.metric)) if name in metrics]
    chance = "-" if task.chance is None else f"{task.chance:.1%}"
    cells = [
        f"{len(task.items):,}",
        "\n".join(shown),
        "\n".join(_percent(metrics[name]) for name in shown),
        _percent(metrics["p_gold"]),
        chance,
    ]
    if base is not None:
        cells += _changes(task, next(t for t in base.tasks if t.name == task.name), shown)
    return cells


def _percent(metric: dict[str, float | None]) -> str:
    error = metric["standard_error"]
    return f"{metric['value'] or 0:.1%}" + ("" if error is None else f" +- {error:.1%}")


def _changes(task: TaskResult, base: TaskResult, shown: list[str]) -> list[str]:
    from evals.tasks.metrics import answers, per_item

    found = []
    for name in shown:
        before, after = per_item(base.items, name), per_item(task.items, name)
        lost, won = int((before > after).sum()), int((after > before).sum())
        changed = float((answers(base.items, name) != answers(task.items, name)).mean())
        found.append((_percent(base.metrics[name]), f"{lost} / {won}", f"{changed:.1%}"))
    return ["\n".join(column) for column in zip(*found, strict=True)]


def _harness(found: dict[str, object]) -> Table:
    table = _block()
    table.add_row("lm-evaluation-harness", str(found.get("harness_version", "")))
    results = found.get("results")
    for task, metrics in results.items() if isinstance(results, dict) else ():
        numbers = {k: v for k, v in metrics.items() if isinstance(v, float)} if isinstance(metrics, dict) else {}
        table.add_row(str(task), ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    return table
