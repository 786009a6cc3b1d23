#!/usr/bin/env python3
"""Methods at 4 and 3 bits on texts and tasks, with paired statistics: records for `ptq compare` and `ptq report`.

    python benchmarks/quality/zero_shot.py MODEL --data DIR --calib 'c4.txt@0:0.8' --records RECORDS [--seeds 0 1 2]
    ptq compare RECORDS/full.json RECORDS/*3bit*.json

Every run leaves one record and is skipped when it is there. The base is run once; its predictions are kept. Packed
folders are kept in ``--outputs`` if given. The scheme is the same for all methods: groups of 64, asymmetric.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import ptq
from cli.shared.models import describe, files_fingerprint, load_model
from evals.evaluate import measure, measure_base
from evals.job import Workload, load_workload
from evals.texts.base_cache import BaseStore
from ptq.api import make_recipe, resolve_device

TASKS = (
    "wikitext2",
    "c4@0.8:1",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "piqa",
    "copa",
    "winogrande",
    "boolq",
    "lambada_openai",
)


def main() -> None:
    options = parse()
    records = Path(options.records)
    records.mkdir(parents=True, exist_ok=True)
    device = resolve_device(options.device)
    workload = load_workload(options.tasks, data=Path(options.data), max_tokens=options.max_tokens, limit=options.limit)
    loaded = {"dtype": options.dtype, "device": device.type}
    store = BaseStore(Path(options.cache), str(Path(options.model).resolve()), loaded, files_fingerprint(options.model))

    def load() -> tuple[Any, Any, Any]:
        found = load_model(options.model, device=str(device), dtype=options.dtype)
        return found.model, found.tokenizer, describe(found)

    base = measure_base(store, workload, load)
    write(records / "full.json", base.record.to_dict())
    for cell in cells(options):
        target = records / f"{cell['name']}.json"
        if not target.exists():
            run(options, cell, workload, base, target, device)


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """rtn once, the others with every seed; the first seed of everything first."""
    return [
        {"name": f"{method}-{bits}bit-seed{seed}", "method": method, "bits": bits, "seed": seed}
        for seed in options.seeds
        for bits in options.bits
        for method in options.methods
        if method != "rtn" or seed == options.seeds[0]
    ]


def run(
    options: argparse.Namespace, cell: dict[str, Any], workload: Workload, base: Any, target: Path, device: torch.device
) -> None:
    """Quantize, load, measure against the base, write the record."""
    chosen = {
        "method": cell["method"],
        "bits": cell["bits"],
        "group_size": 64,
        "symmetric": False,
        "seed": cell["seed"],
    }
    data = {"calib": options.calib, "calib_samples": options.samples, "calib_seqlen": options.seqlen}
    with tempfile.TemporaryDirectory(prefix="ptq-zero-shot-") as scratch:
        out = Path(options.outputs or scratch) / cell["name"]
        start = time.perf_counter()
        ptq.quantize(options.model, make_recipe(chosen | data), out=out, device=str(device))
        quantized = time.perf_counter() - start
        found = load_model(str(out), device=str(device), dtype=options.dtype)
        record = measure(found.model, found.tokenizer, workload, base=base, info=describe(found))
    write(target, record.to_dict() | {"base": None, "quantize_seconds": quantized})  # the base has a file of its own
    print(f"{cell['name']}: quantized in {quantized:.1f} s, measured in {record.seconds:.1f} s", file=sys.stderr)


def write(target: Path, record: dict[str, Any]) -> None:
    target.write_text(json.dumps(record) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="folder of tasks and texts")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--records", required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", default=("rtn", "gptq", "coreq"))
    parser.add_argument("--bits", nargs="+", type=int, default=(4, 3))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="of the evaluation")
    parser.add_argument("--cache", default=".cache/base", help="where the base's predictions are kept")
    parser.add_argument("--outputs", help="keep the packed folders here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
