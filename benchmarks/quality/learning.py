#!/usr/bin/env python3
"""Learned methods beside layer-wise ones, and what each part of them is worth: the figures of docs/results.

    python benchmarks/quality/learning.py MODEL --calib 'c4.txt@0:0.8' --text wikitext2=wikitext2-raw-test.txt \\
        --text c4='c4.txt@0.8:1' --results RESULTS --cells 'W2*' --seeds 0,1,2 --device cuda
    python benchmarks/quality/learning.py --results RESULTS --table

Every run is `ptq quantize` in a process of its own, so that its peak memory is its own; then it is scored here, beside
the full model, whose hidden states are kept. A run leaves one dated JSON record in RESULTS and is skipped when that is
there, so that the tables can be made in parts and by several processes (``--shard 0/2``). A run that fails leaves its
output in RESULTS/logs and the others go on. Other folders, packed or dense, are scored by ``--evaluate NAME=FOLDER``.

A shorter setting for a CPU: ``--samples 16 --seqlen 512 --epochs-scale 0.1 --max-tokens 32768 --seeds 0``.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from learning_cells import TABLES, Cell, arguments, file_name, quantize_flags
from quality import spread
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ptq
from cli.main import main as cli_main
from evals import evaluate
from ptq.api import resolve_device
from ptq.runtime.linear import QuantLinear

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.1


def main() -> None:
    options = parse()
    if options.table:
        print(tables(options.results))
        return
    options.results.mkdir(parents=True, exist_ok=True)
    blocks = int(AutoConfig.from_pretrained(options.model).get_text_config().num_hidden_layers)
    bench, failed = Bench(options), []
    for name, folder in options.evaluate:
        bench.write(f"folder__{name}.json", bench.score_folder(name, Path(folder)))
    for cell, seed in share(options):
        target = options.results / file_name(cell, seed, options.epochs_scale)
        if target.exists():
            continue
        record = bench.run(cell, seed, blocks)
        if record is None:
            failed.append(target.stem)
        else:
            bench.write(target.name, record)
    print(tables(options.results))
    if failed:
        sys.exit(f"error: {len(failed)} runs failed, see {options.results / 'logs'}: {', '.join(failed)}")


def share(options: argparse.Namespace) -> Iterator[tuple[Cell, int]]:
    """This process's part of the chosen runs, each once; the first seed of everything first."""
    chosen = dict.fromkeys(
        cell
        for table in TABLES
        for row, cell in table.rows.items()
        if any(fnmatch.fnmatchcase(f"{table.name}/{row}", pattern) for pattern in options.cells)
    )
    runs = [(cell, seed) for seed in options.seeds for cell in chosen if cell.seeded or seed == options.seeds[0]]
    part, parts = (int(number) for number in options.shard.split("/"))
    return iter(runs[part::parts])


class Bench:
    """The full model and the machine, shared by all runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = resolve_device(options.device)
        self.dtype = getattr(torch, options.eval_dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.base = self.load(options.model)

    def load(self, folder: str | Path) -> Any:
        """A packed or dense model where it is scored; linears that only have packed weights become dense ones."""
        packed = (Path(folder) / "ptq_report.json").exists()
        read = ptq.load if packed else AutoModelForCausalLM.from_pretrained
        return densified(read(folder, dtype=self.dtype).to(self.device).eval(), self.dtype)

    def run(self, cell: Cell, seed: int, blocks: int) -> dict[str, Any] | None:
        """Quantize in a process of its own, load and score; ``None`` if that process failed."""
        scale = self.options.epochs_scale
        fields = arguments(cell, blocks, scale)
        with tempfile.TemporaryDirectory(prefix="ptq-learning-", dir=self.options.scratch) as scratch:
            out = Path(scratch) / "out"
            log = self.options.results / "logs" / file_name(cell, seed, scale)
            report, measured = self.quantize([*quantize_flags(fields), "--seed", str(seed)], out, log)
            if report is None:
                return None
            scores = self.score(out)
        return {
            "record": "ptq-learning",
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "cell": fields | {"seed": seed, "key": cell.key, "epochs_scale": scale if cell.learned else None},
            "texts": scores,
            "bits_per_weight": report["totals"]["bits_per_weight"],
            "file_bytes": report["totals"]["file_bytes"],
            "seconds": report["totals"]["seconds"],
            **measured,
            "timing": report["timing"],
            "peak_device": report["environment"].get("peak_device"),
            "losses": {layer["name"]: layer.get("loss") for layer in report["layers"]},
            "figures": {layer["name"]: layer["figures"] for layer in report["layers"] if layer["figures"]},
            "windows": report["windows"],
            "warnings": report["warnings"],
            "recipe": report["recipe"],
            "calibration": report["calibration"],
            "model": report["model"],
            "environment": report["environment"] | self.environment(),
        }

    def quantize(self, flags: list[str], out: Path, log: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The report, and the process's wall seconds and peak resident bytes; ``None`` for a report after a failure.

        ``log`` receives the report while it runs, and the file of that name with ``.txt`` the messages.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # room for the other process
            torch.cuda.reset_peak_memory_stats()  # for this one, where it does the work
        given = self.options
        data = ["--calib", given.calib, "--calib-samples", given.samples, "--calib-seqlen", given.seqlen]
        place = ["--device", self.device, "--dtype", given.dtype, "--format", "native"]
        command = ["-m", "cli.main", "quantize", *flags, *data, *place, "--json", "-o", out, given.model]
        text = [str(part) for part in command]
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        start = time.perf_counter()
        if given.in_process:
            answered = io.StringIO()
            with contextlib.redirect_stdout(answered):
                status = cli_main(text[2:])
            measured = {"wall_seconds": time.perf_counter() - start, "peak_memory": None, "command": ["python", *text]}
            return (None if status else json.loads(answered.getvalue())), measured
        said = log.with_name(log.name + ".txt")
        with log.open("w") as answer, said.open("w") as messages:
            process = subprocess.Popen(
                [sys.executable, *text],
                stdout=answer,
                stderr=messages,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
            peak = watch(process)
        measured = {"wall_seconds": time.perf_counter() - start, "peak_memory": peak, "command": ["python", *text]}
        if process.returncode:
            last = (said.read_text() + log.read_text()).strip().splitlines()[-1:]  # an error is an answer, too
            print(f"{log.stem}: failed with status {process.returncode}: {''.join(last)}", file=sys.stderr, flush=True)
            return None, measured
        report = json.loads(log.read_text())
        log.unlink()
        return report, measured

    def score(self, folder: Path) -> dict[str, Any]:
        """Perplexity and divergence from the full model on every text."""
        model, scores = self.load(folder), {}
        cut = {"seqlen": self.options.eval_seqlen, "max_tokens": self.options.max_tokens, "bos": "never"}
        for name, source in self.options.text:
            record = evaluate(model, self.tokenizer, texts=[source], against=self.base, **cut).to_dict()
            scores[name] = record["texts"][0] | {"base": record["base"]["texts"][0]}
        return scores

    def score_folder(self, name: str, folder: Path) -> dict[str, Any]:
        """The same of a folder that is there, with what the program that made it wrote beside it."""
        beside = folder / "record.json"
        made = json.loads(beside.read_text()) if beside.exists() else None
        return {
            "record": "ptq-learning",
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "folder": name,
            "texts": self.score(folder),
            "made": made,
            "seconds": made.get("seconds") if made else None,
            "environment": self.environment(),
        }

    def environment(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "eval_device": torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            "eval_dtype": self.options.eval_dtype,
            "eval_seqlen": self.options.eval_seqlen,
            "eval_max_tokens": self.options.max_tokens,
            "threads": torch.get_num_threads(),
        }

    def write(self, name: str, record: dict[str, Any]) -> None:
        """All or nothing, so that a record that is there is whole."""
        target = self.options.results / name
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(target)
        shown = "  ".join(f"{text} {number(score['perplexity'])}" for text, score in record["texts"].items())
        print(f"{target.stem}: {shown}  {record['seconds'] or math.nan:.0f} s", file=sys.stderr, flush=True)


def densified(model: Any, dtype: torch.dtype) -> Any:
    """Unpack once what a packed linear unpacks in every pass, to the same values."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear) and not module.scheme.transforms_input:
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta", dtype=dtype)
            dense.weight = torch.nn.Parameter(module.dequantize(dtype), requires_grad=False)
            dense.bias = module.bias
            model.set_submodule(name, dense)
    return model


def watch(process: subprocess.Popen[Any]) -> int | None:
    """Wait for a process; the largest resident size it had, bytes (Linux).

    Read from outside while it runs: what `getrusage` says of it would include this process, which started it.
    """
    peak, status, done = 0, Path(f"/proc/{process.pid}/status"), threading.Event()

    def poll() -> None:
        nonlocal peak
        while not done.wait(POLL_SECONDS):
            with contextlib.suppress(OSError):  # it has ended
                lines = status.read_text().splitlines()
                peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))])

    observer = threading.Thread(target=poll, daemon=True)
    observer.start()
    try:
        process.wait()
    finally:
        done.set()
        if process.poll() is None:  # interrupted here: do not leave it behind
            process.terminate()
    observer.join()
    return peak or None


def tables(results: Path) -> str:
    """Markdown: a table each of `learning_cells.TABLES` and one of other folders; mean ± deviation over the seeds."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    records = [record for record in records if record.get("record") == "ptq-learning"]
    if not records:
        return f"no records in {results}"
    names = [name for name in records[0]["texts"] if all(name in record["texts"] for record in records)]
    full = ", ".join(f"{name} {number(records[0]['texts'][name]['base']['perplexity'])}" for name in names)
    lines = [f"Full model: perplexity {full}."]
    runs = [record for record in records if "cell" in record]
    scales = {record["cell"]["epochs_scale"] for record in runs} - {None}
    for scale in sorted(scales or {1.0}, reverse=True):
        suffix = "" if scale == 1 else f", epochs x {scale:g}"
        for table in TABLES:
            rows = {
                row: [r for r in runs if r["cell"]["key"] == cell.key and r["cell"]["epochs_scale"] in (None, scale)]
                for row, cell in table.rows.items()
            }
            lines += block(table.name + suffix, {row: found for row, found in rows.items() if found}, names)
    folders = {record["folder"]: [record] for record in records if "folder" in record}
    return "\n".join(lines + block("folders", folders, names))


def block(title: str, rows: dict[str, list[dict[str, Any]]], names: list[str]) -> list[str]:
    """One table: perplexity and KL on every text, seconds, peak memory of the process and of the GPU."""
    if not rows:
        return []
    texts = " | ".join(f"{name} | KL" for name in names)
    lines = [f"\n**{title}**\n", f"| | {texts} | bits | s | MiB | GPU MiB | seeds |"]
    lines.append("|" + "---|" * (2 * len(names) + 6))
    for row, records in rows.items():
        cells = []
        for name in names:
            cells.append(mean([record["texts"][name]["perplexity"] for record in records], 2))
            cells.append(mean([record["texts"][name]["divergence"]["kl_mean"] for record in records], 4))
        cells.append(mean([record.get("bits_per_weight") for record in records[:1]], 3))
        cells.append(mean([record["seconds"] for record in records], 0))
        for peak in ("peak_memory", "peak_device"):
            sizes = [record.get(peak) for record in records]
            cells.append(mean([size and size / 2**20 for size in sizes], 0))
        lines.append(f"| {row} | {' | '.join(cells)} | {len(records)} |")
    return lines


def mean(values: list[float | None], digits: int) -> str:
    """Mean ± deviation; a perplexity that overflowed is not a number to average."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "inf" if known else ""
    return spread(known, digits)


def number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2f}"


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"needs NAME=FILE, got {text!r}")
    return name, value


def listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of the full model")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder for records and logs")
    parser.add_argument("--table", action="store_true", help="print the tables of the records, and stop")
    parser.add_argument("--list", action="store_true", help="print the names of all cells, and stop")
    parser.add_argument("--calib", help="calibration text, as for ptq quantize")
    parser.add_argument("--text", type=pair, action="append", default=[], metavar="NAME=FILE", help="a text to score")
    parser.add_argument("--cells", type=listed, default=["*"], metavar="GLOB[,GLOB]", help="of TABLE/ROW")
    parser.add_argument("--evaluate", type=pair, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in listed(text)], default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--epochs-scale", type=float, default=1.0, help="of all epochs and iterations")
    parser.add_argument("--eval-seqlen", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, help="of each text; default all")
    parser.add_argument("--dtype", default="auto", help="of the passes while quantizing")
    parser.add_argument("--eval-dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--in-process", action="store_true", help="quantize here: faster, without peaks of memory")
    parser.add_argument("--shard", default="0/1", help="this process's part of the runs, e.g. 0/2 and 1/2")
    parser.add_argument("--scratch", help="folder for the packed models, which are deleted")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{table.name}/{row}: {cell.key}" for table in TABLES for row, cell in table.rows.items()))
        sys.exit()
    if not options.table and not (options.model and options.calib and options.text):
        parser.error("MODEL, --calib and --text are required")
    return options


if __name__ == "__main__":
    main()
