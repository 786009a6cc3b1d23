"""`evaluate`: one model on texts and tasks, alone or against a base, as one `Record`."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import transformers

from calib.data.chat import RowReader
from calib.data.tokens import tokenizer_hash
from calib.errors import ModelError, UsageError
from evals.harness import run_harness
from evals.inference.fingerprint import model_fingerprint
from evals.inference.logits import model_device
from evals.inference.weight_bytes import weight_bytes
from evals.items import item_hash
from evals.job import DEFAULT_TASKS, TextJob, WindowOptions, Workload, load_workload
from evals.record import ModelInfo, Record, TaskResult, TextResult, read_task_result, read_text_result
from evals.scorer import Base, Progress, Scorer, text_store
from evals.tasks.types import LoadedTask
from evals.texts.base_cache import BaseStore, default_cache

__all__ = ["BASE_TOP_K", "environment", "evaluate", "measure", "measure_base", "model_info", "module_store"]

BASE_TOP_K = 256


class _Draw(TypedDict):
    limit: int | None
    fewshot: int
    seed: int


class _Scoring(TypedDict):
    batch_size: int | str
    seed: int
    progress: Progress | None


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | None = None,
    *,
    texts: Sequence[str] = (),
    data: str | Path | None = None,
    against: Any | None = None,
    convention: str | Sequence[str] = "segments",
    limit: int | None = None,
    fewshot: int = 0,
    seed: int = 0,
    cache: str | Path | None = None,
    base_top_k: int | None = BASE_TOP_K,
    harness: Sequence[str] = (),
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    **windows: Unpack[WindowOptions],
) -> Record:
    """Measure a causal language model, quantized or not, on texts and tasks, where it is.

    Args:
        model: a Hugging Face causal language model; for texts alone any torch module from ids to logits.
        tokenizer: its tokenizer.
        tasks: names of tasks and texts (docs/tasks.md, docs/evaluation.md), or paths of texts; ``None`` is
            ``wikitext2`` where ``texts`` and ``harness`` are empty.
        texts: more texts, by name or path.
        data: folder with the files of tasks and texts; without it they come from the hub.
        against: the base in full precision; adds divergence and what its answers are compared with.
        convention: of the perplexity, one or several of ``segments``, ``llamacpp``, ``sliding``, ``documents``.
        limit: the first rows of each task, the first items of each text.
        fewshot: examples before each question.
        seed: of the choice of examples and of the bootstrap.
        cache: where the base's predictions are stored; ``None`` is `default_cache`.
        base_top_k: entries that are stored per prediction of the base; ``None`` for the whole vocabulary.
        harness: tasks for lm-evaluation-harness, if it is installed.
        batch_size: sequences at once, or ``auto``; halved when memory runs out.
        progress: called with what is being scored, how much is done and how much there is.
        windows: ``seqlen``, ``stride``, ``max_tokens``, ``documents`` and ``bos``; see `evals.job.WindowOptions`.

    Raises:
        UsageError: an unknown name, option or combination.
        DataError: data that is missing or wrong, too short, or longer than the context.
        ModelError: the base has another vocabulary.
        NumericalError: scores that are not finite.
        OutputError: the cache cannot be written.
    """
    names = _names(tasks) if tasks is not None else () if texts or harness else DEFAULT_TASKS
    rows, folder = RowReader(tokenizer=lambda: tokenizer), None if data is None else Path(data)
    drawn: _Draw = {"limit": limit, "fewshot": fewshot, "seed": seed}
    workload = load_workload(
        names, texts=texts, data=folder, conventions=_names(convention), rows=rows, **drawn, **windows
    )
    scoring: _Scoring = {"batch_size": batch_size, "seed": seed, "progress": progress}
    base = None
    if against is not None:
        store = module_store(against, tokenizer, cache)
        base = measure_base(store, workload, lambda: (against, tokenizer, None), top_k=base_top_k, **scoring)
    options = {"limit": limit, "fewshot": fewshot or None}
    return measure(model, tokenizer, workload, base=base, harness=_names(harness), harness_options=options, **scoring)


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def measure(
    model: Any,
    tokenizer: Any,
    workload: Workload,
    *,
    base: Base | None = None,
    batch_size: int | str = "auto",
    info: ModelInfo | None = None,
    seed: int = 0,
    harness: Sequence[str] = (),
    harness_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Record:
    """`evaluate` for a workload that is read already, against a base that is measured already.

    Args:
        model: as in `evaluate`.
        tokenizer: its tokenizer.
        workload: what is evaluated.
        base: what the model is compared with.
        batch_size: as in `evaluate`.
        info: what is known of the model besides what can be seen of it.
        seed: of the bootstrap.
        harness: as in `evaluate`.
        harness_options: ``limit`` and ``fewshot`` of lm-evaluation-harness.
        progress: as in `evaluate`.

    Raises:
        ModelError: the base's tokenizer cuts text otherwise, so that tokens do not match.
        PtqError: as in `evaluate`.
    """
    started = time.monotonic()
    identity = tokenizer_hash(tokenizer)
    if base is not None and base.record.tokenizer_hash != identity:
        raise ModelError(
            f"the base {base.record.model.source} has another tokenizer: its tokens are not the model's, and neither "
            "divergence nor paired log-likelihoods exist. Give the model that was quantized."
        )
    work = Scorer(model, tokenizer, batch_size, seed, progress)
    bases: Sequence[TextResult | None] = [None] * len(workload.texts) if base is None else base.record.texts
    texts = tuple(work.text(job, base, own) for job, own in zip(workload.texts, bases, strict=True))
    tasks = tuple(work.task(task) for task in workload.tasks)
    found = None
    if harness:
        size = 1 if batch_size == "auto" else int(batch_size)
        found = run_harness(model, tokenizer, list(harness), batch_size=size, **(harness_options or {}))
    return Record(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=info or model_info(model),
        tokenizer_hash=identity,
        texts=texts,
        tasks=tasks,
        harness=found,
        environment=environment(model) | {"batch_size": batch_size},
        seconds=round(time.monotonic() - started, 3),
        notes=tuple(dict.fromkeys((*work.size.notes, *(() if base is None else base.store.notes)))),
        base=None if base is None else base.record,
    )


def measure_base(
    store: BaseStore,
    workload: Workload,
    load: Callable[[], tuple[Any, Any, ModelInfo | None]],
    *,
    top_k: int | None = BASE_TOP_K,
    batch_size: int | str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Base:
    """Results of the base for a workload: those that are stored, and the missing ones, for which it is loaded.

    Args:
        store: the stored predictions and results of this base.
        workload: the same as the model's.
        load: returns the base, its tokenizer and its `ModelInfo`; called only if something is missing.
        top_k: ``base_top_k`` of `evaluate`.
        batch_size: as in `evaluate`.
        seed: of the bootstrap.
        progress: as in `evaluate`.

    Raises:
        UsageError: ``top_k`` below 1.
        PtqError: as in `evaluate`.
    """
    if top_k is not None and top_k < 1:
        raise UsageError(f"--base-top-k must be 1 or more, or 'full', got {top_k}.")
    started = time.monotonic()

    @functools.cache
    def worker() -> Scorer:
        model, tokenizer, info = load()
        if store.card is None:
            place = environment(model) | {"batch_size": batch_size}
            known = {"model": dataclasses.asdict(info or model_info(model)), "environment": place}
            store.describe(known | {"tokenizer_hash": tokenizer_hash(tokenizer)})
        return Scorer(model, tokenizer, batch_size, seed, progress, label="base: ")

    texts = tuple(_stored_text(store, job, worker, top_k) for job in workload.texts)
    tasks = tuple(_stored_task(store, task, worker) for task in workload.tasks)
    if store.card is None:
        worker()
    card = store.card or {}
    record = Record(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=ModelInfo(**card["model"]),
        tokenizer_hash=card["tokenizer_hash"],
        texts=texts,
        tasks=tasks,
        harness=None,
        environment=card["environment"],
        seconds=round(time.monotonic() - started, 3),
        notes=tuple(worker().size.notes) if worker.cache_info().currsize else (),
    )
    return Base(store, record, top_k)


def module_store(base: Any, tokenizer: Any, cache: str | Path | None = None) -> BaseStore:
    """The store of a base in memory, as it reads what this tokenizer cuts."""
    fingerprint = model_fingerprint(base)
    loaded = {"dtype": str(getattr(base, "dtype", None)), "device": model_device(base).type}
    root = default_cache() if cache is None else Path(cache)
    loaded["tokenizer"] = tokenizer_hash(tokenizer)
    return BaseStore(root, f"{type(base).__name__}-{fingerprint[:16]}", loaded, fingerprint)


def model_info(model: Any, source: str | None = None) -> ModelInfo:
    """What can be seen of a model in memory; tensors that are shared count once."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = type(model).__name__
    return ModelInfo(source or name, model_fingerprint(model), name, parameters, weight_bytes(model))


def environment(model: Any) -> dict[str, Any]:
    """Versions and machine, for a record."""
    device = model_device(model)
    return {
        "ptq": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(getattr(model, "dtype", "unknown")).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("ptq-toolkit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _stored_text(store: BaseStore, job: TextJob, worker: Callable[[], Scorer], top_k: int | None) -> TextResult:
    place = text_store(store, job, top_k)
    stored = place.read()
    result = None if stored is None else read_text_result(stored)
    if result is None or not place.complete():
        result = worker().keep(job, place, top_k)
        place.write(result.to_dict())
    return result


def _stored_task(store: BaseStore, task: LoadedTask, worker: Callable[[], Scorer]) -> TaskResult:
    asked = [[list(map(list, question.pairs)), question.gold] for question in task.questions]
    decides = [asked, [question.cluster for question in task.questions], task.task.metric, task.task.chance]
    place = store.task({"task": task.task.name, "questions": item_hash(decides), "clusters": len(task.clusters)})
    stored = place.read()
    result = None if stored is None else read_task_result(stored)
    if result is None:
        result = worker().task(task)
        place.write(result.to_dict())
    return result
