"""One model at work on texts and tasks: plans and requests in, `TextResult` and `TaskResult` out."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from calib.errors import ModelError
from evals.bos_choice import choose_bos, follow_base
from evals.inference.batching import BatchSize
from evals.inference.logits import ModelLogits, model_device
from evals.items import Items, item_hash
from evals.job import TextJob
from evals.record import Divergence, Record, TaskResult, TextResult
from evals.statistics import block_bootstrap, neighbours
from evals.tasks.loglikelihood import Answer, score_requests
from evals.tasks.requests import Request, encode_pairs
from evals.tasks.types import LoadedTask
from evals.texts.base_cache import BaseStore, TextStore
from evals.texts.kl import Scores
from evals.texts.scoring import keep_base, score_windows
from evals.texts.windows import Plan, context_length, make_plan

__all__ = ["Base", "Progress", "Scorer", "text_store"]

_NO_CONTEXT = 2048  # tokens read by a model that names no context, as in lm-evaluation-harness
Progress = Callable[[str, int, int], None]  # what is being scored, done, in all


@dataclasses.dataclass(frozen=True)
class Base:
    """A base whose results are kept, for a model to be compared with.

    Args:
        store: where they are.
        record: of the base, on the same items.
        top_k: entries kept of each prediction; ``None`` for all.
    """

    store: BaseStore
    record: Record
    top_k: int | None


class Scorer:
    """Scores texts and tasks with one model.

    Args:
        model: as in `evals.evaluate`.
        tokenizer: as in `evals.evaluate`.
        batch_size: sequences at once, or ``auto``.
        seed: of the bootstrap.
        progress: as in `evals.evaluate`.
        label: put before the names that ``progress`` is called with.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int | str,
        seed: int,
        progress: Progress | None,
        label: str = "",
    ) -> None:
        model.eval()  # dropout would be noise
        self.model, self.tokenizer = model, tokenizer
        self.size = BatchSize(batch_size, model_device(model))
        self._seed, self._progress, self._label = seed, progress, label

    def text(self, job: TextJob, base: Base | None, base_result: TextResult | None) -> TextResult:
        """Perplexity of a text, and divergence from a base that has been run on it."""
        started = time.monotonic()
        plan = self._plan(job, base_result)
        store = None if base is None else text_store(base.store, job, base.top_k)
        if base_result is not None and base_result.items.ids.tolist() != plan.hashes:
            raise ModelError(
                f"the base reads {job.name} in other windows ({base_result.settings}) than the model "
                f"({plan.settings}): their contexts differ. Say --seqlen."
            )
        source = self._source(plan.windows[0].ids)
        scores = score_windows(source, plan.windows, self.size, base=store, progress=self._step(job, len(plan.windows)))
        divergence = None if base is None else self._divergence(plan, scores, base)
        return self._result(job, plan, scores, source, divergence, started)

    def keep(self, job: TextJob, store: TextStore, top_k: int | None) -> TextResult:
        """Run the model as a base: keep its predictions on disk. Windows that are there already are not run again."""
        started = time.monotonic()
        plan = self._plan(job)
        source = self._source(plan.windows[0].ids)
        store.begin(len(plan.windows))
        missing = store.missing()
        windows = [plan.windows[index] for index in missing]
        store.require_space(sum(window.scored for window in windows), top_k, source.vocab)
        keep_base(
            source,
            windows,
            self.size,
            top_k=top_k,
            store=lambda place, kept: store.write_window(missing[place], kept),
            progress=self._step(job, len(windows)),
        )
        scores = [Scores(store.nll(index)) for index in range(len(plan.windows))]
        return self._result(job, plan, scores, source, None, started)

    def task(self, task: LoadedTask) -> TaskResult:
        """Log-likelihoods of every answer to every question."""
        started = time.monotonic()
        context = context_length(self.model) or _NO_CONTEXT
        pairs = [pair for question in task.questions for pair in question.pairs]
        places = [question.where for question in task.questions for _ in question.pairs]
        flat = iter(encode_pairs(pairs, self.tokenizer, context, places))
        requests = [[next(flat) for _ in question.pairs] for question in task.questions]
        source = self._source(torch.tensor(requests[0][0].ids))
        done = self._step(task, len(requests))
        answers = score_requests(source, requests, self.size, done)
        cut = sum(any(request.cut for request in question) for question in requests)
        notes = (f"{cut} questions exceed the context of {context} tokens and were cut on the left",) if cut else ()
        return TaskResult(
            name=task.task.name,
            source=task.source,
            settings=task.settings,
            metric=task.task.metric,
            chance=task.task.chance,
            items=_task_items(task, requests, answers),
            notes=(*task.notes, *source.notes, *notes),
            seconds=round(time.monotonic() - started, 3),
        )

    def _plan(self, job: TextJob, base_result: TextResult | None = None) -> Plan:
        """The windows of a text, with BOS as for the base where there is one."""
        if base_result is None:
            bos, notes = choose_bos(job, self.tokenizer, self.model, self._source, self.size)
        else:
            bos, notes = follow_base(base_result.settings)
        options = {name: value for name, value in job.options.items() if name != "bos"}
        plan = make_plan(
            job.text.text,
            self.tokenizer,
            self.model,
            convention=job.convention,
            bos=bos,
            templated=job.text.templated,
            **options,
        )
        return dataclasses.replace(plan, notes=(*plan.notes, *notes))

    def _source(self, probe: torch.Tensor) -> ModelLogits:
        if self._logits is None:
            self._logits = ModelLogits(self.model, probe)
        return self._logits

    _logits: ModelLogits | None = None

    def _step(self, job: TextJob | LoadedTask, total: int) -> Callable[[int], None] | None:
        if self._progress is None:
            return None
        if isinstance(job, LoadedTask):
            name = job.task.name
        else:
            name = job.name if job.convention == "segments" else f"{job.name} ({job.convention})"
        report = functools.partial(self._progress, self._label + name)
        return lambda done: report(done, total)

    def _result(
        self,
        job: TextJob,
        plan: Plan,
        scores: Sequence[Scores],
        source: ModelLogits,
        divergence: Divergence | None,
        started: float,
    ) -> TextResult:
        items = _text_items(plan, scores)
        return TextResult(
            name=job.name,
            source=job.text.source,
            sha256=job.text.sha256,
            convention=plan.convention,
            settings=plan.settings,
            nll=float(items["nll"].sum()),
            tokens=int(items["tokens"].sum()),
            words=None if plan.words is None else sum(plan.words),
            bytes=None if plan.bytes is None else sum(plan.bytes),
            items=items,
            divergence=divergence,
            notes=(*job.text.notes, *plan.notes, *source.notes),
            seconds=round(time.monotonic() - started, 3),
        )

    def _divergence(self, plan: Plan, scores: Sequence[Scores], base: Base) -> Divergence:
        columns = [_joined(scores, name) for name in ("nll", "base_nll", "kl", "same_top")]
        nll, base_nll, kl, same = columns
        change = np.exp(-nll) - np.exp(-base_nll)
        median, p99, p999, top = (float(q) for q in np.quantile(kl, [0.5, 0.99, 0.999, 1.0]))
        counts = _by_item(plan, scores, "nll", count=True)
        clusters = None if plan.convention == "documents" else neighbours(len(counts))

        def error(*names: str) -> float | None:
            sums = _by_item(plan, scores, names[0])
            if len(names) == 2:
                sums = sums - _by_item(plan, scores, names[1])
            if len(sums) < 2:
                return None
            return float(block_bootstrap(sums, counts, seed=self._seed, clusters=clusters).std(ddof=1))

        return Divergence(
            kl_mean=float(kl.mean()),
            kl_standard_error=error("kl"),
            kl_median=median,
            kl_p99=p99,
            kl_p999=p999,
            kl_max=top,
            kl_low=_finite_mean(scores, "kl_low"),
            kl_high=_finite_mean(scores, "kl_high"),
            kl_draw_error=float(np.sqrt(_joined(scores, "kl_variance").sum()) / len(kl)),
            top1_agreement=float(same.mean()),
            top1_standard_error=error("same_top"),
            dp_rms=float(np.sqrt(np.mean(change**2))),
            dp_mean=float(change.mean()),
            log_ratio=float((nll - base_nll).mean()),
            log_ratio_standard_error=error("nll", "base_nll"),
            top_k=base.top_k,
            base=base.record.model.fingerprint,
        )


def text_store(store: BaseStore, job: TextJob, top_k: int | None) -> TextStore:
    """Where a base's predictions for a text are."""
    return store.text({"text": job.text.sha256, "convention": job.convention, "options": job.options, "top_k": top_k})


def _joined(scores: Sequence[Scores], name: str) -> np.ndarray[Any, Any]:
    """A column of all windows, float64 ``[tokens]``."""
    found: np.ndarray[Any, Any] = torch.cat([getattr(part, name) for part in scores]).numpy()
    return found


def _finite_mean(scores: Sequence[Scores], name: str) -> float | None:
    """``None`` where a model rules tokens out: then there is no bound."""
    mean = float(_joined(scores, name).mean())
    return mean if math.isfinite(mean) else None


def _by_item(plan: Plan, scores: Sequence[Scores], name: str, *, count: bool = False) -> np.ndarray[Any, Any]:
    """Sums, or numbers of tokens, of each item, float64 ``[items]``."""
    values = [float(getattr(part, name).numel() if count else getattr(part, name).sum()) for part in scores]
    return np.bincount([window.item for window in plan.windows], weights=values)


def _text_items(plan: Plan, scores: Sequence[Scores]) -> Items:
    columns = {
        "nll": _by_item(plan, scores, "nll"),
        "tokens": _by_item(plan, scores, "nll", count=True).astype(np.int32),
    }
    for name, values in (("bytes", plan.bytes), ("words", plan.words)):
        if values is not None:
            columns[name] = np.array(values, dtype=np.int32)
    if scores[0].kl is not None:
        columns["kl"] = _by_item(plan, scores, "kl")
        columns["same_top"] = _by_item(plan, scores, "same_top").astype(np.int32)
    return Items(np.array(plan.hashes, dtype=np.uint64), columns)


def _task_items(task: LoadedTask, requests: Sequence[Sequence[Request]], answers: Sequence[Sequence[Answer]]) -> Items:
    texts = [answer for question in task.questions for answer in question.answers]
    columns = {
        "gold": np.array([question.gold for question in task.questions], dtype=np.int32),
        "counts": np.array([len(question.pairs) for question in task.questions], dtype=np.int32),
        "ll": np.array([answer.ll for question in answers for answer in question], dtype=np.float32),
        "characters": np.array([len(text) for text in texts], dtype=np.int32),
        "bytes": np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts], dtype=np.int32),
    }
    if task.task.kind == "continuation":
        columns["greedy"] = np.array([question[0].greedy for question in answers], dtype=np.uint8)
    if task.clusters:
        columns["cluster"] = np.array([question.cluster for question in task.questions], dtype=np.int32)
    ids = [item_hash([list(map(list, question.pairs)), question.gold]) for question in task.questions]
    return Items(np.array(ids, dtype=np.uint64), columns)
