#!/usr/bin/env python3
"""Exports on a real model: format x method x reader.

    python benchmarks/quality/exports.py MODEL --calib 'c4.txt@0:0.8' --text wikitext2-raw-test.txt --rows rows.jsonl
    python benchmarks/quality/exports.py --rows rows.jsonl --table     # the rows as Markdown

Every row quantizes the model, exports the result and runs the same tokens in our runtime and in the reader, a process
of its own (`exports_reader.py`): the largest difference of the logits, the perplexity of each, the bytes of the weight
files. A row is one JSON line, written as it is done; rows that are there are not run again, and a row that fails says
why. A reader that is not installed here is run by the interpreter that ``PTQ_READER_GPTQMODEL`` or
``PTQ_READER_LLAMA_CPP`` names, with ``PTQ_READER_PYTHONPATH`` as its path.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import ptq
from calib.data.sources import read_text
from calib.data.tokens import tokenize
from cli.shared.models import load_model
from ptq import PtqError
from ptq.export import export

_READER = Path(__file__).with_name("exports_reader.py")


@dataclasses.dataclass(frozen=True)
class Case:
    """One format.

    Args:
        name: of the row.
        format: of the export.
        reader: what reads it.
        fields: of the recipe.
    """

    name: str
    format: str
    reader: str
    fields: Mapping[str, Any]


def _integers(bits: int, group_size: int, *, symmetric: bool = True) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "symmetric": symmetric}


def cases(group_size: int) -> list[Case]:
    """All formats; integers in groups of ``group_size`` where the table does not say another."""
    half = {"scale_dtype": "float16"}
    return [
        Case("gptq int4 sym", "gptq", "gptqmodel", _integers(4, group_size)),
        Case("gptq_v2 int3 asym g64", "gptq", "gptqmodel", _integers(3, 64, symmetric=False)),
        Case("awq int4 asym g64", "awq", "gptqmodel", _integers(4, 64, symmetric=False)),
        Case("compressed-tensors int4 sym", "compressed-tensors", "transformers", _integers(4, group_size)),
        Case("compressed-tensors fp8", "compressed-tensors", "transformers", {"preset": "FP8_DYNAMIC"}),
        Case("compressed-tensors nvfp4", "compressed-tensors", "transformers", {"preset": "NVFP4A16"}),
        Case("compressed-tensors mxfp4", "compressed-tensors", "transformers", {"preset": "MXFP4A16"}),
        Case("gguf q4_0", "gguf", "llama_cpp", {**_integers(4, 32), **half}),
        Case("gguf q8_0", "gguf", "llama_cpp", {**_integers(8, 32), **half}),
        Case("gguf q4_k", "gguf", "llama_cpp", {"format": "q4_k"}),
        Case("gguf q3_k", "gguf", "llama_cpp", {"format": "q3_k"}),
    ]


def run(case: Case, method: str, options: argparse.Namespace, tokens: np.ndarray[Any, Any]) -> dict[str, Any]:
    """One row: figures, or ``error`` with what could not be done."""
    row: dict[str, Any] = {"case": case.name, "method": method, "reader": case.reader}
    with tempfile.TemporaryDirectory(prefix="ptq-exports-", dir=options.work) as folder:
        try:
            row |= _measured(case, method, options, tokens, Path(folder))
        except (PtqError, RuntimeError) as error:
            row["error"] = str(error)
    return row


def _measured(
    case: Case, method: str, options: argparse.Namespace, tokens: np.ndarray[Any, Any], folder: Path
) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if method != "rtn":
        data = {
            "calib": options.calib,
            "calib_samples": options.samples,
            "calib_seqlen": options.seqlen,
            "seed": options.seed,
        }
    started = time.monotonic()
    result = folder / "result"
    ptq.quantize(options.model, out=result, method=method, device="cpu", container="native", **data, **case.fields)
    quantized, started = time.monotonic() - started, time.monotonic()
    exported = folder / ("model.gguf" if case.format == "gguf" else "exported")
    # Embedding and head stay as they are in GGUF files too, so that both runtimes have the same weights.
    export(result, format=case.format, out=exported, embedding="keep")
    seconds = time.monotonic() - started
    ours = folder / "ours.npy"
    _our_logits(result, tokens, ours)
    theirs, kernel, versions = _their_logits(case.reader, exported, tokens, folder)
    return {
        "bytes": _weight_bytes(exported),
        "quantize_seconds": quantized,
        "export_seconds": seconds,
        "kernel": kernel,
        "versions": versions,
        "tokens": int(tokens.size),
        **_compared(np.load(ours, mmap_mode="r"), np.load(theirs, mmap_mode="r"), tokens),
    }


def _our_logits(result: Path, tokens: np.ndarray[Any, Any], out: Path) -> None:
    model: Any = load_model(str(result)).model
    with torch.no_grad():
        rows = [model(torch.from_numpy(row[None])).logits[0].float().numpy() for row in tokens]
    np.save(out, np.stack(rows))


def _their_logits(
    reader: str, exported: Path, tokens: np.ndarray[Any, Any], folder: Path
) -> tuple[Path, str, dict[str, str]]:
    """Where the reader's logits are, what computed them, and its versions.

    Raises:
        RuntimeError: the reader failed; its last words.
    """
    np.save(folder / "tokens.npy", tokens)
    out = folder / "theirs.npy"
    python = os.environ.get(f"PTQ_READER_{reader.upper()}", sys.executable)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.environ.get("PTQ_READER_PYTHONPATH", "")}
    command = [python, str(_READER), reader, str(folder / "tokens.npy"), str(exported), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{reader} failed: {done.stderr.strip().splitlines()[-1] if done.stderr else ''}")
    told = json.loads(done.stdout.splitlines()[-1])
    return out, told["kernels"][0], told["versions"]


def _compared(ours: Any, theirs: Any, tokens: np.ndarray[Any, Any]) -> dict[str, float]:
    """Largest difference of the logits, their spread, the perplexity of both and how often the best token agrees."""
    largest, spread, same = 0.0, [], []
    losses: tuple[list[float], list[float]] = [], []
    for row, mine, other in zip(tokens, ours, theirs, strict=True):
        pair = torch.from_numpy(np.array(mine)), torch.from_numpy(np.array(other))
        largest = max(largest, float((pair[0] - pair[1]).abs().max()))
        spread.append(float(pair[0].std()))
        same.append(float((pair[0].argmax(-1) == pair[1].argmax(-1)).float().mean()))
        for found, logits in zip(losses, pair, strict=True):
            loss = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(row[1:]))
            found.append(float(loss))
    return {
        "largest_difference": largest,
        "logits_std": float(np.mean(spread)),
        "same_top": float(np.mean(same)),
        "perplexity_ours": float(np.exp(np.mean(losses[0]))),
        "perplexity_reader": float(np.exp(np.mean(losses[1]))),
    }


def _weight_bytes(exported: Path) -> int:
    files = [exported] if exported.is_file() else exported.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def table(path: Path) -> str:
    """The rows as Markdown."""
    lines = [
        "| format | method | reader | largest difference (of the logits' deviation) | same best "
        "token | ours: perplexity | reader: perplexity | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _done(path):
        start = f"| {row['case']} | {row['method']} | {row['reader']} |"
        if "error" in row:
            lines.append(f"{start} {row['error']} | | | | |")
            continue
        share = row["largest_difference"] / row["logits_std"]
        lines.append(
            f"{start} {row['largest_difference']:.4f} ({share:.4f}) | {100 * row['same_top']:.1f} % "
            f"| {row['perplexity_ours']:.4f} | {row['perplexity_reader']:.4f} | {row['bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def _done(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder in full precision")
    parser.add_argument("--rows", type=Path, required=True, help="the JSON lines")
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown and run nothing")
    parser.add_argument("--calib", help="text of coreq")
    parser.add_argument("--text", help="text of the perplexity")
    parser.add_argument("--only", default="*", help="pattern of 'case method', e.g. 'gguf * rtn'")
    parser.add_argument("--methods", nargs="+", default=["rtn", "coreq"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=8, help="of the text that is compared")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--work", default=None, help="folder for what lies between")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    if options.table:
        print(table(options.rows))
        return
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    count = options.sequences * options.length
    stream = tokenize(read_text(options.text, limit=8 * count).text, tokenizer)[:count]
    tokens = stream.reshape(options.sequences, options.length).numpy()
    there = {(row["case"], row["method"]) for row in _done(options.rows)}
    for method in options.methods:
        for case in cases(options.group_size):
            if (case.name, method) in there or not fnmatch.fnmatchcase(f"{case.name} {method}", options.only):
                continue
            row = run(case, method, options, tokens)
            with options.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
