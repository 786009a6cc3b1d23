"""``ptq eval``: perplexity, tasks, and divergence from a base, as one record."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.errors import OutputError, UsageError

if TYPE_CHECKING:
    from cli.shared.models import LoadedModel
    from evals.job import Workload
    from evals.record import ModelInfo, Record
    from evals.scorer import Base, Progress

__all__ = ["command"]


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "--tasks", metavar="NAMES", help="Names of tasks and evaluation texts, comma-separated. [default: wikitext2]"
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="SOURCE",
    help="Text for perplexity: a text file, a .jsonl, .json or .parquet file, wikitext2, c4, pydoc:eval or "
    "REPO:SPLIT:FIELD; append @0.8:1 to use only the last 20 %. Repeatable.",
)
@click.option(
    "--data",
    envvar="PTQ_DATA",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with task files NAME.jsonl and text files NAME.txt (or $PTQ_DATA); by default both are downloaded "
    "from the Hugging Face hub.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Evaluate only the first N rows per task and the first N windows per text.",
)
@click.option("--fewshot", default=0, type=click.IntRange(min=0), metavar="K", help="Few-shot examples per question.")
@click.option(
    "--convention",
    default="segments",
    metavar="NAMES",
    help="How text is cut into windows for perplexity: segments (GPTQ papers), llamacpp, sliding, documents "
    "(lm-eval); comma-separated.",
)
@click.option(
    "--bos",
    default="auto",
    metavar="auto|always|never",
    help="Prepend BOS to every window. auto: if the tokenizer adds BOS and the model needs it; never: as in most "
    "published results.",
)
@click.option(
    "--seqlen",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens per window. [default: 2048; llamacpp 512; documents the model's context]",
)
@click.option(
    "--stride", type=click.IntRange(min=1), metavar="N", help="For --convention sliding: tokens scored per window."
)
@click.option(
    "--documents",
    default="auto",
    metavar="RULE",
    help="For --convention documents: how the text is split into documents: auto, wikitext, lines, blank-lines, whole.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Use only the first N tokens of each text.")
@click.option("--batch-size", default="auto", metavar="auto|N", help="Sequences per batch.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Device to run on.")
@click.option(
    "--dtype",
    default="auto",
    metavar="DTYPE",
    help="Data type of activations and unquantized weights: auto, float32, bfloat16 or float16.",
)
@click.option(
    "--against",
    metavar="BASE",
    help="Full-precision model to compare with: adds KL(BASE || MODEL), top-1 agreement, changed answers.",
)
@click.option(
    "--base-top-k",
    default="256",
    metavar="K|full",
    help="Store the K most probable tokens per prediction of the base and sample the others; full stores all logits.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Cache for the base model's results. [default: $PTQ_CACHE or ~/.cache/ptq]",
)
@click.option(
    "--harness",
    metavar="TASKS",
    help="Also run these lm-evaluation-harness tasks (needs pip install 'ptq-toolkit[lm-eval]').",
)
@click.option(
    "--seed", default=0, type=click.IntRange(min=0), metavar="N", help="Random seed of few-shot examples and bootstrap."
)
@click.option("--trust-remote-code", is_flag=True, help="Allow running Python code from the model repository.")
@click.option(
    "--card/--no-card",
    default=True,
    help="Put the scores into the model card (README.md) of a folder that ptq wrote.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the results as JSON on stdout (docs/json.md) and nothing else."
)
@click.option("-o", "--out", type=click.Path(dir_okay=False), metavar="FILE", help="Write the results to a JSON file.")
def command(**options: Any) -> None:
    """Measure MODEL: a folder (packed or plain), a .gguf file or a hub id.

    Texts give perplexity, tasks give accuracy and the probability of the right answer. With --against the same is
    measured of BASE, once: its results are kept on disk. Figures compare only under the same convention, length and
    tokenizer: see docs/evaluation.md. For two or more models, write records and use ptq compare.

    \b
    Examples:
      ptq eval OUT
      ptq eval OUT --tasks wikitext2,c4@0.8:1,arc_easy,winogrande --data DIR --against MODEL -o record.json
      ptq eval OUT --text test.txt --convention segments,llamacpp,documents
      ptq eval OUT --text pydoc:eval --seqlen 512 --max-tokens 65536 --json
      ptq eval OUT --harness gsm8k,mmlu --limit 100
    """
    from cli.shared.eval_tables import show
    from cli.shared.terminal.screen import console, echo

    _check_target(options["out"])
    record = _evaluate(options)
    line = json.dumps(record.to_dict(), allow_nan=False)
    problem = None if options["out"] is None else _write(Path(options["out"]), line + "\n")
    if options["as_json"]:
        echo(line)
    else:
        show(record, console())
    if options["card"]:
        from cli.shared.card_scores import add_to_card

        said = add_to_card(options["model"], record)
        if said is not None:
            echo(said, err=True)
    if problem is not None:  # after the result: a file that cannot be written must not cost it
        raise problem


def _evaluate(options: dict[str, Any]) -> Record:
    """Read the data, then the models, one after the other, and score."""
    from cli.shared.idle import given_options, idle_sentences
    from cli.shared.models import describe, load_model, locate
    from cli.shared.terminal.bar import counter_bars
    from cli.shared.terminal.screen import echo
    from evals.evaluate import measure
    from ptq.runtime.chosen import kernel_line

    top_k = _top_k(options["base_top_k"])
    sources = [source for source in (options["model"], options["against"]) if source is not None]
    for source in sources:
        locate(source, options["trust_remote_code"])
    workload = _workload(options)  # before the models: a wrong name must not cost loading them
    for sentence in idle_sentences(given_options(click.get_current_context()), _idle(options, workload)):
        echo(sentence, err=True)
    with counter_bars() as progress:
        base = None if options["against"] is None else _base(options, workload, top_k, progress)
        subject = load_model(options["model"], **_loading(options))
        info, kernels = describe(subject), kernel_line(subject.model)
        record = measure(
            subject.model,
            subject.tokenizer,
            workload,
            base=base,
            batch_size=options["batch_size"],
            info=info,
            seed=options["seed"],
            harness=_names(options["harness"]),
            harness_options={"limit": options["limit"], "fewshot": options["fewshot"] or None},
            progress=progress,
        )
    ran = () if kernels is None else (kernels,)
    return dataclasses.replace(record, notes=(*record.notes, *ran, *_seen_before(info, workload)))


def _idle(options: dict[str, Any], workload: Workload) -> dict[str, str]:
    """Why options have no effect on this workload, by parameter."""
    reasons: dict[str, str] = {}
    if options["against"] is None:
        reasons |= dict.fromkeys(("base_top_k", "cache"), "it is about the base, and there is no --against")
    if not workload.texts:
        names = ("convention", "seqlen", "stride", "documents", "max_tokens", "bos")
        reasons |= dict.fromkeys(names, "no text is scored")
    elif "documents" not in _names(options["convention"]):
        reasons["documents"] = "it belongs to --convention documents"
    if not workload.tasks and not options["harness"]:
        reasons["fewshot"] = "no task is scored"
    return reasons


def _workload(options: dict[str, Any]) -> Workload:
    from calib.data.chat import RowReader
    from cli.shared.models import load_tokenizer
    from evals.job import DEFAULT_TASKS, load_workload

    names = _names(options["tasks"])
    nothing = not names and not options["texts"] and not options["harness"]
    # read once, and only where a text has rows of messages
    tokenizer = functools.cache(lambda: load_tokenizer(options["model"], options["trust_remote_code"]))
    return load_workload(
        DEFAULT_TASKS if nothing else names,
        texts=options["texts"],
        data=options["data"],
        conventions=_names(options["convention"]),
        rows=RowReader(tokenizer=tokenizer),
        **{
            name: options[name]
            for name in ("seqlen", "stride", "max_tokens", "documents", "bos", "limit", "fewshot", "seed")
        },
    )


def _base(options: dict[str, Any], workload: Workload, top_k: int | None, progress: Progress) -> Base:
    """The base's results, from the disk where they are there; it is not in memory afterwards."""
    from cli.shared.models import describe, files_fingerprint, load_model, resolved_dtype
    from evals.evaluate import measure_base
    from evals.texts.base_cache import BaseStore, default_cache
    from ptq.api import resolve_device

    source = options["against"]
    place = resolve_device(options["device"])
    loaded = {"dtype": resolved_dtype(options["dtype"], place, source), "device": place.type}
    path = Path(source)
    name = str(path.resolve()) if path.exists() else source
    store = BaseStore(options["cache"] or default_cache(), name, loaded, files_fingerprint(source))

    def load() -> tuple[Any, Any, ModelInfo]:
        found: LoadedModel = load_model(source, **_loading(options))
        return found.model, found.tokenizer, describe(found)

    return measure_base(
        store,
        workload,
        load,
        top_k=top_k,
        batch_size=options["batch_size"],
        seed=options["seed"],
        progress=progress,
    )


def _loading(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("device", "dtype", "trust_remote_code")}


def _names(listed: str | None) -> tuple[str, ...]:
    return tuple(name for part in (listed or "").split(",") if (name := part.strip()))


def _top_k(given: str) -> int | None:
    if given == "full":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"--base-top-k must be a number of at least 1, or 'full', got {given!r}.")
    return int(given)


def _seen_before(info: ModelInfo, workload: Workload) -> tuple[str, ...]:
    """A warning where a model is scored on a text that it was calibrated on."""
    seen = (info.calibration or {}).get("text_sha256")
    texts = dict.fromkeys(job.name for job in workload.texts if seen is not None and job.text.sha256 == seen)
    return tuple(f"the model was calibrated on this very text: {name}" for name in texts)


def _check_target(out: str | None) -> None:
    if out is not None and not Path(out).resolve().parent.is_dir():
        raise OutputError(f"cannot write {out}: there is no folder {Path(out).resolve().parent}; create it first.")


def _write(path: Path, content: str) -> OutputError | None:
    """Write the record before anything is printed, also for a reader who closes the pipe; the error if that fails."""
    from calib.checkpoint.atomic_files import write_file

    try:
        write_file(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
    except OutputError as error:
        return error
    return None
