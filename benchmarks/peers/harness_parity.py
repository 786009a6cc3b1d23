#!/usr/bin/env python3
"""Our log-likelihoods beside those of lm-evaluation-harness, answer by answer, on the same rows and in float32.

    python benchmarks/peers/harness_parity.py MODEL --data DIR [--rows N] [--tasks arc_easy piqa ...] [-o record.json]

DIR holds JSONL files (docs/tasks.md). The harness reads them by itself, as data sets of kind ``json``, and builds its
prompts by the templates below, which were written from its own task files; no code of ours touches its strings.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evals.tasks.metrics import per_item

ROW = "{{query[:-1] if query.endswith('\n') else query}}"
CHOICES = {"doc_to_choice": "choices", "doc_to_target": "gold"}
FILES = {"openbookqa": "openbook_qa"}
TEMPLATES: dict[str, dict[str, str]] = {
    "arc_easy": CHOICES | {"doc_to_text": ROW + "\nAnswer:"},
    "arc_challenge": CHOICES | {"doc_to_text": ROW + "\nAnswer:"},
    "piqa": CHOICES | {"doc_to_text": ROW + "\nAnswer:"},
    "openbookqa": CHOICES | {"doc_to_text": ROW},
    "winogrande": {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"},
    "boolq": CHOICES | {"doc_to_text": ROW + "\nAnswer:"},
}
METRICS = ("acc", "acc_norm")


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = parse()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tasks = compare(model, tokenizer, Path(options.data), options.tasks, options.rows, options.batch_size)
    record = {
        "benchmark": "harness_parity",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": Path(options.model).name,
        "dtype": "float32",
        "machine": {"platform": platform.platform(), "threads": options.threads},
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "torch", "transformers")},
        "max_abs_difference": max(task["max_abs_difference"] for task in tasks.values()),
        "rows_that_differ": sum(task[f"{name}_differs"] for task in tasks.values() for name in METRICS),
        "tasks": tasks,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n", encoding="utf-8")
    sys.exit(record["max_abs_difference"] > options.tolerance or record["rows_that_differ"] > 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("--data", required=True, help="folder of JSONL files, itself or its subfolder tasks/")
    parser.add_argument("--rows", type=int, help="first rows of each task; all without it")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TEMPLATES), default=list(TEMPLATES))
    parser.add_argument("--batch-size", type=int, default=8, help="of the harness; ours is auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tolerance", type=float, default=1e-3, help="nats an answer may differ by")
    parser.add_argument("-o", "--output", help="file for the record")
    return parser.parse_args()


def compare(
    model: Any, tokenizer: Any, data: Path, names: Sequence[str], rows: int | None, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Task -> how far both sides are apart."""
    from evals.evaluate import evaluate

    theirs = by_the_harness(model, tokenizer, data, names, rows, batch_size)
    record = evaluate(model, tokenizer, tasks=list(names), data=data, limit=rows)
    return {task.name: difference(task.items, *theirs[task.name]) for task in record.tasks}


def difference(items: Any, lls: list[list[float]], figures: dict[str, list[float]]) -> dict[str, Any]:
    """One task: the largest difference of an answer's log-likelihood (nats), and rows with another score."""
    flat = [ll for row in lls for ll in row]
    apart = [abs(float(ours) - ll) for ours, ll in zip(items["ll"], flat, strict=True)]
    found: dict[str, Any] = {
        "rows": len(lls),
        "answers": len(flat),
        "max_abs_difference": max(apart),
        "mean_abs_difference": sum(apart) / len(apart),
    }
    for name in METRICS:
        ours = per_item(items, name).tolist()
        found[name] = {"ours": sum(ours) / len(ours), "harness": sum(figures[name]) / len(ours)}
        found[f"{name}_differs"] = sum(a != b for a, b in zip(ours, figures[name], strict=True))
    return found


def by_the_harness(
    model: Any, tokenizer: Any, data: Path, names: Sequence[str], rows: int | None, batch_size: int
) -> dict[str, tuple[list[list[float]], dict[str, list[float]]]]:
    """Task -> log-likelihoods of every row's answers, and its scores by metric."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for task in harness_tasks(data, names, cache):
            task.set_config(key="num_fewshot", value=0)
            task.build_all_requests(limit=rows, rank=0, world_size=1)
            answers = [ll for ll, _ in wrapped.loglikelihood(task.instances, disable_tqdm=True)]
            found[task.config.task] = _by_row(task, answers)
    return found


def harness_tasks(data: Path, names: Sequence[str], cache: str) -> list[Any]:
    """Tasks of the harness on the files of ``data``; ``cache`` is a folder for what it makes of them."""
    from lm_eval.api.task import ConfigurableTask

    fields = {"output_type": "multiple_choice", "dataset_path": "json", "test_split": "test"}
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS]
    tasks = []
    for name in names:
        files = {"data_files": {"test": str(_file(data, FILES.get(name, name)))}, "cache_dir": cache}
        config = {"task": name, "dataset_kwargs": files, "metric_list": metrics}
        tasks.append(ConfigurableTask(config=fields | config | TEMPLATES[name]))
    return tasks


def _file(data: Path, name: str) -> Path:
    (path,) = [path for place in (data, data / "tasks") for path in place.glob(f"{name}*.jsonl")]
    return path


def _by_row(task: Any, answers: list[float]) -> tuple[list[list[float]], dict[str, list[float]]]:
    lls: list[list[float]] = []
    figures: dict[str, list[float]] = {name: [] for name in METRICS}
    documents: dict[int, Any] = {}
    for instance, ll in zip(task.instances, answers, strict=True):
        if instance.doc_id not in documents:
            documents[instance.doc_id] = instance.doc
            lls.append([])
        lls[-1].append(ll)
    for document, row in zip(documents.values(), lls, strict=True):
        scores = task.process_results(document, [(ll, False) for ll in row])
        for name in METRICS:
            figures[name].append(float(scores[name]))
    return lls, figures


if __name__ == "__main__":
    main()
