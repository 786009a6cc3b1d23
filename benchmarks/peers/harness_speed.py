#!/usr/bin/env python3
"""Wall time of zero-shot tasks, ours beside lm-evaluation-harness: same rows, dtype and threads.

    python benchmarks/peers/harness_speed.py MODEL --data DIR [--rows N] [--rounds 3] [--threads 2] [-o record.json]

Every run is a process of its own. The order of the sides turns round from one round to the next. The harness runs with
several batch sizes, and the best one counts. ``seconds`` is from a loaded model to the metrics: reading rows,
building prompts, tokenizing, scoring; ``process_seconds`` also has imports and loading.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEFAULT_TASKS = ("arc_easy", "arc_challenge", "piqa", "openbookqa")


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(run_side(options)))
        return
    sides = ["ours", *(f"harness {size}" for size in options.batch_sizes)]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            runs[side].append(in_a_process(side, options))
            print(f"round {number + 1}: {side}: {runs[side][-1]['seconds']:.1f} s", file=sys.stderr)
    record = summary(options, runs)
    text = json.dumps(record, indent=2)
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("--data", required=True, help="folder of JSONL files")
    parser.add_argument("--rows", type=int, help="first rows of each task; all without it")
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT_TASKS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-sizes", nargs="+", default=["1", "8", "64"], help="of the harness")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", help="file for the record")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run of one side."""
    command = [sys.executable, __file__, options.model, "--data", options.data, "--side", side]
    command += ["--dtype", options.dtype, "--device", options.device, "--threads", str(options.threads)]
    command += ["--tasks", *options.tasks] + (["--rows", str(options.rows)] if options.rows else [])
    threads = {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    start = time.monotonic()
    ended = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found | {"process_seconds": time.monotonic() - start}


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and scores of a side, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    name, _, size = options.side.partition(" ")
    side = ours if name == "ours" else harness
    prepared = side(model, tokenizer, options, size)  # imports are not timed
    start = time.monotonic()
    scores = prepared()
    return {"seconds": time.monotonic() - start, "scores": scores}


def ours(model: Any, tokenizer: Any, options: argparse.Namespace, size: str) -> Any:
    from evals.evaluate import evaluate

    def run() -> dict[str, Any]:
        record = evaluate(model, tokenizer, tasks=options.tasks, data=Path(options.data), limit=options.rows)
        return {task.name: {name: task.metrics[name]["value"] for name in ("acc", "acc_norm")} for task in record.tasks}

    return run


def harness(model: Any, tokenizer: Any, options: argparse.Namespace, size: str) -> Any:
    import lm_eval
    from harness_parity import harness_tasks
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=False)  # its own task files are not needed, and take five seconds to find
    batch = int(size) if size.isdigit() else size

    def run() -> dict[str, Any]:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        with tempfile.TemporaryDirectory() as cache:
            found = lm_eval.simple_evaluate(
                wrapped,
                tasks=harness_tasks(Path(options.data), options.tasks, cache),
                task_manager=manager,
                batch_size=batch,
                limit=options.rows,
                log_samples=False,
            )
        results = found["results"]
        return {task: {name: results[task][f"{name},none"] for name in ("acc", "acc_norm")} for task in options.tasks}

    return run


def summary(options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The record: medians, and ours over the harness's best."""
    sides = {
        side: {
            "seconds": statistics.median(run["seconds"] for run in found),
            "process_seconds": statistics.median(run["process_seconds"] for run in found),
            "runs": [round(run["seconds"], 3) for run in found],
            "scores": found[0]["scores"],
        }
        for side, found in runs.items()
    }
    best = min((side for side in sides if side != "ours"), key=lambda side: sides[side]["seconds"])
    return {
        "benchmark": "harness_speed",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": Path(options.model).name,
        "tasks": options.tasks,
        "rows": options.rows,
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "torch", "transformers")},
        "best_of_the_harness": best,
        "ours_over_harness": sides["ours"]["seconds"] / sides[best]["seconds"],
        "sides": sides,
    }


if __name__ == "__main__":
    main()
