#!/usr/bin/env python3
"""Ours beside llm-compressor and GPTQModel: seconds and perplexity on the same tokens, bits and machine.

    benchmarks/peers/make_envs.sh ENVS
    python benchmarks/peers/compare.py MODEL WORK --envs ENVS --calib c4.txt@0:0.8 --text wikitext2-raw-test.txt

One calibration batch is drawn by our loader and given to everyone as token ids. Every runner gets a process in its
own environment, one after the other; only its quantization call is timed. Then every result is scored in this
environment by the same protocol. A result that is there is not made again without ``--redo``. Writes WORK/compare.json
and WORK/compare.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptq
from calib.data.tokens import load_calibration
from evals import evaluate

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Runner:
    """One row: which script with which method, in which environment (``None``: this one)."""

    name: str
    script: str
    method: str
    env: str | None = None

    def python(self, envs: Path) -> str:
        return sys.executable if self.env is None else str(envs / self.env / "bin" / "python")


RUNNERS = (
    Runner("llm-compressor gptq", "run_llmcompressor.py", "gptq", "llmcompressor"),
    Runner("GPTQModel gptq", "run_gptqmodel.py", "gptq", "gptqmodel"),
    Runner("GPTQModel gptaq", "run_gptqmodel.py", "gptaq", "gptqmodel"),
    Runner("ptq gptq", "run_ours.py", "gptq"),
    Runner("ptq coreq", "run_ours.py", "coreq"),
)


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    tokens, calibration = draw(options)
    rows = []
    for runner in RUNNERS:
        if options.only and runner.name not in options.only:
            continue
        folder = options.work / runner.name.replace(" ", "-")
        if options.redo or not (folder / "record.json").exists():
            run(runner, folder, tokens, options)
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        rows.append({"name": runner.name, **record, **score(folder, options)})
    full = score(Path(options.model), options)
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(options.model).name,
        "calibration": calibration,
        "evaluation": {"text": Path(options.text).name, "seqlen": options.seqlen, "max_tokens": options.max_tokens},
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": options.threads},
        "full_model": full,
        "runs": rows,
    }
    (options.work / "compare.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (options.work / "compare.md").write_text(table(summary), encoding="utf-8")
    print(table(summary))


def draw(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The calibration tokens as a file for all runners, and their certificate."""
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    drawn = load_calibration(options.calib, tokenizer, samples=options.samples, seqlen=options.calib_seqlen, seed=0)
    path: Path = options.work / "tokens.safetensors"
    save_file({"input_ids": drawn.tokens.contiguous()}, path)
    return path, drawn.describe() | {"source": Path(options.calib).name}


def run(runner: Runner, folder: Path, tokens: Path, options: argparse.Namespace) -> None:
    """One quantization from the start in a process of its own; its output goes to a log beside the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_suffix(".log")
    threads = str(options.threads)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [runner.python(options.envs), HERE / runner.script, options.model, tokens, folder]
    print(f"{runner.name} ...", file=sys.stderr, flush=True)
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [str(part) for part in (*command, "--method", runner.method)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **offline, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"error: {runner.name} ended with status {done.returncode}; its output is in {log}")


def score(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of a checkpoint, packed or dense, and its size."""
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    full = folder == Path(options.model)
    load = AutoModelForCausalLM.from_pretrained if full else ptq.load
    model = load(folder, dtype=torch.bfloat16).eval()
    cut = {"seqlen": options.seqlen, "max_tokens": options.max_tokens, "bos": "never"}
    (result,) = evaluate(model, tokenizer, texts=[options.text], **cut).texts
    packed = folder / "packed" if (folder / "packed").is_dir() else folder
    return {
        "perplexity": result.perplexity,
        "standard_error": result.standard_error,
        "scored_tokens": result.tokens,
        "file_mb": sum(path.stat().st_size for path in packed.glob("*.safetensors")) / 1e6,
    }


def table(summary: dict[str, Any]) -> str:
    """Markdown: a row a run, ratios to the fastest peer."""
    full, rows = summary["full_model"]["perplexity"], summary["runs"]
    peers = [row["seconds"] for row in rows if row["peer"] != "ptq"]
    lines = [
        f"Full model: perplexity {full:.2f}.",
        "",
        "| | perplexity | seconds | to the fastest peer | CPU seconds | peak MiB | file MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row['seconds'] / min(peers):.2f}" if peers else ""
        lines.append(
            f"| {row['name']} | {row['perplexity']:.2f} | {row['seconds']:.1f} | {ratio} | {row['cpu_seconds']:.1f} "
            f"| {row['peak_mib']:.0f} | {row['file_mb']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the full model")
    parser.add_argument("work", type=Path, help="folder for checkpoints, records and the table")
    parser.add_argument("--envs", type=Path, required=True, help="what make_envs.sh made")
    parser.add_argument("--calib", required=True, help="calibration text, as for ptq quantize")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calib-seqlen", type=int, default=512)
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens in an evaluation segment")
    parser.add_argument("--max-tokens", type=int, default=32 * 1024)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", choices=[runner.name for runner in RUNNERS], metavar="NAME")
    parser.add_argument("--redo", action="store_true", help="quantize again where there is a record")
    return parser.parse_args()


if __name__ == "__main__":
    main()
