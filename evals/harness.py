"""lm-evaluation-harness on a model in memory, packed or not: for tasks that our table has not, or a second opinion.

An extra: ``pip install 'ptq-toolkit[lm-eval]'``. What it prints is kept back and told only where it fails. It seeds the
global generators, as its results depend on that; they are put back afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calib.errors import DataError, PtqError, UsageError, unknown_name

__all__ = ["run_harness"]

_TOLD = 2000
"""Characters of what the harness printed that an error repeats."""


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int | str = 1,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness.

    Args:
        model: a causal language model of transformers, in evaluation mode afterwards.
        tokenizer: its tokenizer; not changed.
        tasks: names of tasks, groups or tags of the harness.
        limit: first rows of each task only.
        fewshot: number of examples; ``None`` leaves it to each task.
        batch_size: a number, or ``"auto"``.
        include_path: folder with more task files of the harness.

    Returns:
        JSON data: ``harness_version``, ``results`` (task -> metric -> value), ``groups``, ``versions``, ``n_shot``,
        ``n_samples``, ``settings``, ``seconds``.

    Raises:
        UsageError: the extra is not installed, an unknown task, no task, a limit below 1, code that would be run.
        DataError: the rows of a task cannot be read.
        PtqError: the harness fails otherwise; its own words are repeated.
    """
    if not tasks or (limit is not None and limit < 1) or (fewshot is not None and fewshot < 0):
        raise UsageError(f"the harness needs a task, limit >= 1 and fewshot >= 0; got {tasks}, {limit}, {fewshot}.")
    start = time.monotonic()
    with _quiet() as printed, _generators_kept():
        manager = _task_manager(include_path)
        _check_names(tasks, manager)
        loaded = _load(manager, tasks, printed)
        options = {"num_fewshot": fewshot, "limit": limit, "task_manager": manager}
        found = _evaluate(model, tokenizer, loaded, batch_size, options, printed)
    settings = {"tasks": list(tasks), "limit": limit, "fewshot": fewshot, "batch_size": batch_size}
    return {
        "harness_version": importlib.metadata.version("lm_eval"),
        "results": found["results"],
        "groups": found.get("groups", {}),
        "versions": found["versions"],
        "n_shot": found["n-shot"],
        "n_samples": found["n-samples"],
        "settings": settings,
        "seconds": round(time.monotonic() - start, 3),
    }


def _task_manager(include_path: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            f"lm-evaluation-harness cannot be imported ({error}); install it: pip install 'ptq-toolkit[lm-eval]'."
        ) from error
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"there is no folder {include_path} with task files of the harness.")
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _check_names(tasks: Sequence[str], manager: Any) -> None:
    for name in tasks:
        if name not in manager.all_tasks:
            error = str(unknown_name("task of lm-evaluation-harness", name, manager.all_tasks))
            raise UsageError(error.partition(" Known:")[0] + " `lm-eval ls tasks` lists them.")


def _load(manager: Any, tasks: Sequence[str], printed: io.StringIO) -> list[Any]:
    """Groups and tasks with their rows, apart from the evaluation, so that a missing data set is told as one."""
    try:
        loaded = manager.load(list(tasks))
    except Exception as error:  # data sets, their readers and the tasks' own code raise errors of many classes
        raise DataError(
            f"lm-evaluation-harness cannot load the rows of {', '.join(tasks)} ({_reason(error)}). Without a network, "
            f"the data sets must be in the cache of the hub.{_tail(printed)}"
        ) from error
    groups = [loaded["groups"][name] for name in tasks if name in loaded["groups"]]
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    return groups + [task for name, task in loaded["tasks"].items() if name not in inside]


def _evaluate(
    model: Any,
    tokenizer: Any,
    loaded: list[Any],
    batch_size: int | str,
    options: dict[str, Any],
    printed: io.StringIO,
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        # The harness chooses a padding token on the tokenizer that it is given.
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found = lm_eval.simple_evaluate(wrapped, tasks=loaded, batch_size=batch_size, log_samples=False, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a task's code raises; the cause is chained
        raise PtqError(f"lm-evaluation-harness failed ({_reason(error)}).{_tail(printed)}") from error
    plain: dict[str, Any] = json.loads(json.dumps(_finite(found), default=str))
    return plain


def _finite(value: Any) -> Any:
    """JSON has no NaN: ``None`` instead; numbers of numpy become Python's."""
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """What is printed or logged inside goes into the buffer."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logger = logging.getLogger("lm_eval")
    before = logger.handlers[:], logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield printed
    finally:
        logger.handlers, logger.propagate = before


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """The global generators are as before afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _reason(error: Exception) -> str:
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__


def _tail(printed: io.StringIO) -> str:
    said = printed.getvalue().strip()[-_TOLD:]
    return f" It said:\n{said}" if said else ""
