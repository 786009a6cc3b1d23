"""``ptq eval``: perplexity and bits per byte of a model, and its divergence from a base."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.errors import OutputError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RECORD_VERSION", "command"]

RECORD_VERSION = 1


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "--text",
    default="wikitext2",
    metavar="SOURCE",
    help="A text file, a .jsonl file, wikitext2, c4, pydoc:eval or REPO:SPLIT:FIELD; @0.8:1 behind it takes a part.",
)
@click.option("--seqlen", default=2048, type=click.IntRange(min=2), help="Tokens in a segment.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Only the first N tokens of the text.")
@click.option("--batch-size", default=1, type=click.IntRange(min=1), metavar="N", help="Segments at the same time.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Where to work.")
@click.option("--dtype", default="auto", metavar="DTYPE", help="auto, float32, bfloat16 or float16.")
@click.option("--against", metavar="BASE", help="Also measure KL(BASE || MODEL) and top-1 agreement with BASE.")
@click.option("--trust-remote-code", is_flag=True, help="Allow model code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="The record on stdout (docs/evaluation.md), nothing else there.")
@click.option("-o", "--out", type=click.Path(dir_okay=False), metavar="FILE", help="Write the record to a JSON file.")
def command(
    model: str,
    text: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    against: str | None,
    as_json: bool,
    out: str | None,
    **protocol: Any,
) -> None:
    """Measure how well MODEL predicts a text: a folder (packed or plain), a .gguf file or a hub id.

    The text is cut into segments that do not overlap; the first token of each is not scored. Perplexities compare
    only where text, segment length and tokenizer are the same: see docs/evaluation.md.

    \b
    Examples:
      ptq eval OUT
      ptq eval OUT --text test.txt --seqlen 2048 --max-tokens 65536
      ptq eval OUT --text pydoc:eval --seqlen 512 --against MODEL
      ptq eval model.gguf --text c4.txt@0.8:1 --json -o record.json
    """
    from cli.progress import console

    _check_target(out)
    loading = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    record = _evaluate(model, against, text, loading, protocol)
    line = json.dumps(record, allow_nan=False)
    if out is not None:
        _write(Path(out), line + "\n")
    if as_json:
        click.echo(line)
    else:
        console().print(_table(record))


def _evaluate(
    model: str, against: str | None, text: str, loading: dict[str, Any], protocol: dict[str, Any]
) -> dict[str, Any]:
    """Read the text, load, score; the record as plain data."""
    import evals
    from calib.text import tokenizer_hash
    from cli.bar import counter_bar
    from cli.models import environment, load_model, locate

    for source in (model, against):
        if source is not None:
            locate(source)
    words = evals.load_text(text)  # before the models: a wrong name must not cost loading them
    subject = load_model(model, **loading)
    base = None if against is None else load_model(against, **loading)
    started = time.monotonic()
    with counter_bar("segments") as progress:
        options = protocol | {"progress": progress}
        if base is None:
            result = evals.perplexity(subject.model, words.text, subject.tokenizer, **options).to_dict()
            scores = {"perplexity": result, "divergence": None, "base_perplexity": None}
        else:
            found = evals.divergence(subject.model, base.model, words.text, subject.tokenizer, **options).to_dict()
            scores = {"perplexity": found.pop("model"), "base_perplexity": found.pop("base"), "divergence": found}
    return {
        "record": "ptq-eval",
        "version": RECORD_VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": model,
        "base": against,
        "text": {"source": text, "sha256": words.sha256, "notes": list(words.notes)},
        "tokenizer_hash": tokenizer_hash(subject.tokenizer),
        "protocol": {"convention": "segments", **protocol},
        **scores,
        "seconds": round(time.monotonic() - started, 3),
        "environment": environment(subject.model),
    }


def _check_target(out: str | None) -> None:
    if out is not None and not Path(out).resolve().parent.is_dir():
        raise OutputError(f"cannot write {out}: there is no folder {Path(out).resolve().parent}; create it first.")


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.") from error


def _table(record: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for label, value in (*_perplexity_rows(record), *_divergence_rows(record)):
        table.add_row(label, value)
    for note in (*record["text"]["notes"], *record["perplexity"]["notes"]):
        table.add_row("note", note)
    return table


def _perplexity_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    scores = record["perplexity"]
    where = record["environment"]
    rows = [
        ("model", record["model"]),
        ("text", f"{record['text']['source']}: {scores['tokens']:,} tokens scored, {scores['bytes']:,} bytes"),
        ("segments", f"{scores['segments']} of {scores['seqlen']} tokens"),
        ("perplexity", _with_error(scores)),
        ("bits per byte", "-" if scores["bits_per_byte"] is None else f"{scores['bits_per_byte']:.4f}"),
    ]
    return [*rows, ("time", f"{record['seconds']:.1f} s on {where['device']}, {where['dtype']}")]


def _with_error(scores: dict[str, Any]) -> str:
    if scores["perplexity"] is None:
        return f"exp({scores['mean_nll']:.1f})"
    error = scores["standard_error"]
    spread = "" if error is None else f" +- {scores['perplexity'] * error:.3f} (standard error over segments)"
    return f"{scores['perplexity']:.4f}{spread}"


def _divergence_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    scores = record["divergence"]
    if scores is None:
        return []
    kl, ratio = scores["kl_standard_error"], scores["log_ratio_standard_error"]
    tail = f"{scores['kl_median']:.5f} / {scores['kl_p99']:.4f} / {scores['kl_p999']:.4f} / {scores['kl_max']:.4f}"
    return [
        ("base", f"{record['base']}: perplexity {_with_error(record['base_perplexity'])}"),
        ("ln ratio", f"{scores['log_ratio']:.5f}" + ("" if ratio is None else f" +- {ratio:.5f} (paired)")),
        ("KL(base || model)", f"{scores['kl_mean']:.5f}" + ("" if kl is None else f" +- {kl:.5f}") + " nats a token"),
        ("KL median / 99 % / 99.9 % / max", tail),
        ("top-1 agreement", f"{scores['top1_agreement']:.2%}"),
    ]
