#!/usr/bin/env python3
"""LLM-FP4's table: min-max integers, min-max floats, searched floats and LLM-FP4 at W4A4, W4A8 and W4A16.

    python benchmarks/quality/llm_fp4.py MODEL --calib 'c4.txt@0:0.8' --wiki wikitext2-raw-test.txt \\
        --held-out 'c4.txt@0.8:1' --data TASKS --records RECORDS --seconds 340
    python benchmarks/quality/llm_fp4.py --table RECORDS  # the records as a Markdown table, mean +- spread over seeds

Every run leaves one JSON record and is skipped when its record is there. The most important rows come first: all of
W4A4 with the first seed and their tasks, the other widths, more seeds, then what search and shift bring alone, the
other ways (folded, sequential) and GPTQ beside them for its seconds. ``--seconds`` begins no new run after that time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from quality import segment_nll, spread
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptq
from evals import evaluate
from ptq.api import make_recipe, resolve_device

_PLAIN = {"search": False, "shift": "off"}
ROWS: dict[str, dict[str, Any]] = {
    "LLM-FP4": {},
    "searched FP": {"shift": "off"},
    "MinMax FP": _PLAIN,
    "MinMax INT": _PLAIN | {"weight_formats": "e1m2"},
    "MinMax FP with shift": {"search": False},
    "LLM-FP4 E2M1": {"weight_formats": "e2m1", "act_formats": "e2m1"},
    "LLM-FP4 folded": {"shift": "folded"},
    "LLM-FP4 sequential": {"sequential": True},
}
INTEGERS = {4: "e1m2", 8: "e1m6"}
MAIN = ("LLM-FP4", "searched FP", "MinMax FP", "MinMax INT")
WITHOUT_SHIFTS = ("searched FP", "MinMax FP", "MinMax INT")  # the rows of W4A16, where LLM-FP4 is searched FP
TASKS = ("arc_easy", "arc_challenge", "piqa", "openbook_qa", "copa")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a row, the width of inputs (16 leaves them as they are), the draw of the calibration text."""

    row: str
    act_bits: int
    seed: int

    @property
    def file(self) -> str:
        """Name of its record."""
        return f"{self.row}__a{self.act_bits}__{self.seed}.json".replace(" ", "_")

    @property
    def recipe(self) -> dict[str, Any]:
        """What is quantized how."""
        if self.row == "full":
            return {}
        if self.row == "GPTQ":
            return {"method": "gptq", "bits": 4, "group_size": None}
        chosen = {"method": "llm-fp4", **ROWS[self.row]}
        if self.act_bits != 16:
            chosen["act_bits"] = self.act_bits
            if self.row == "MinMax INT":
                chosen["act_formats"] = INTEGERS[self.act_bits]
        return chosen


def cells(seeds: list[int]) -> list[Cell]:
    """All runs, the most important first."""
    first, others = seeds[0], seeds[1:]
    found = [Cell("full", 16, first), *(Cell(row, 4, first) for row in MAIN)]
    found += [Cell("GPTQ", 16, first), *(Cell(row, 8, first) for row in MAIN)]
    found += [Cell(row, 16, first) for row in WITHOUT_SHIFTS]
    found += [Cell(row, 4, seed) for seed in others for row in MAIN]
    found += [Cell(row, 4, first) for row in ROWS if row not in MAIN]
    found += [Cell(row, 8, seed) for seed in others for row in MAIN]
    return found + [Cell(row, 16, seed) for seed in others for row in WITHOUT_SHIFTS]


def main() -> None:
    options = parse()
    if options.table:
        print(table(Path(options.table)))
        return
    started, bench = time.monotonic(), Bench(options)
    for cell in cells(options.seeds):
        target = Path(options.records) / cell.file
        if target.exists() or (options.rows and cell.row not in options.rows):
            continue
        if time.monotonic() - started > options.seconds:
            print(f"time is up before {cell}", file=sys.stderr)
            return
        record = bench.run(cell)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{cell}: {brief(record)}", file=sys.stderr, flush=True)


class Bench:
    """The full model and the machine, shared by all runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, resolve_device(options.device)
        self.dtype = getattr(torch, options.eval_dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=self.dtype)
        self.base = base.to(self.device).eval()

    def run(self, cell: Cell) -> dict[str, Any]:
        """Quantize, load and evaluate one cell."""
        tasks = TASKS if self.options.data and (cell.row == "full" or (cell.act_bits, cell.seed) == (4, 0)) else ()
        environment = {"platform": platform.platform(), "eval_dtype": str(self.dtype)}
        if not cell.recipe:
            found = self.evaluate(self.base, tasks)
            return {"cell": dataclasses.asdict(cell), "environment": environment, **found}
        data = {"calib": self.options.calib, "calib_samples": self.options.samples}
        data |= {"calib_seqlen": self.options.seqlen, "seed": cell.seed, "compute_dtype": self.options.dtype}
        with tempfile.TemporaryDirectory(prefix="ptq-llm-fp4-") as folder:
            start = time.perf_counter()
            report = ptq.quantize(
                self.options.model, make_recipe(cell.recipe | data), out=folder, device=str(self.device)
            )
            seconds = time.perf_counter() - start
            model = ptq.load(folder, dtype=self.dtype).to(self.device).eval()
            result = self.evaluate(model, tasks)
        return {
            "cell": dataclasses.asdict(cell),
            "bits_per_weight": report.totals["bits_per_weight"],
            "seconds": seconds,
            "timing": report.timing,
            "layers": [
                {"name": layer.name, "scheme": layer.scheme, "loss": layer.loss, "loss_rtn": layer.loss_rtn}
                | {"figures": layer.figures}
                for layer in report.layers
            ],
            "recipe": report.recipe,
            "calibration": report.calibration,
            "environment": dict(report.environment) | environment,
            **result,
        }

    def evaluate(self, model: Any, tasks: tuple[str, ...]) -> dict[str, Any]:
        """KL to the base and perplexity on both texts, and the tasks' accuracies."""
        options = self.options
        measured: dict[str, Any] = {"evaluation_seconds": -time.perf_counter()}
        for name, text, limit in (
            ("wiki", options.wiki, options.max_tokens),
            ("held_out", options.held_out, options.max_held_out),
        ):
            cut = {"seqlen": options.eval_seqlen, "bos": "never", "max_tokens": limit}
            (found,) = evaluate(model, self.tokenizer, texts=[text], against=self.base, **cut).texts
            measured |= {
                name: found.perplexity or math.inf,
                f"{name}_kl": found.divergence.kl_mean,
                f"{name}_segment_nll": segment_nll(found),
                f"{name}_tokens": found.tokens,
            }
        if tasks:
            scored = evaluate(model, self.tokenizer, list(tasks), data=options.data, limit=options.limit)
            measured["tasks"] = {task.name: task.metrics[task.metric]["value"] for task in scored.tasks}
        measured["evaluation_seconds"] += time.perf_counter()
        return measured


def brief(record: dict[str, Any]) -> str:
    """A line about a record."""
    seconds = f" {record['seconds']:.0f} s" if "seconds" in record else ""
    tasks = f" tasks {100 * statistics.fmean(record['tasks'].values()):.1f} %" if "tasks" in record else ""
    return (
        f"wiki {record['wiki']:.2f} KL {record['wiki_kl']:.3f} held-out {record['held_out']:.2f} "
        f"KL {record['held_out_kl']:.3f}{tasks}{seconds}"
    )


def table(folder: Path) -> str:
    """Markdown, one table per width: mean and, with several seeds, standard deviation over seeds."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = []
    for act_bits in (4, 8, 16):
        rows = [record for record in records if record["cell"]["act_bits"] == act_bits]
        lines += [
            f"\n**W4A{act_bits}**\n",
            "| | WikiText-2 | KL | held-out C4 | KL | tasks, % | solve s | all s | seeds |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in ("full", "GPTQ", *reversed(MAIN), *(name for name in ROWS if name not in MAIN)):
            same = [record for record in rows if record["cell"]["row"] == row]
            if same:
                lines.append(f"| {row} | {' | '.join(columns(same))} |")
    return "\n".join(lines)


def columns(same: list[dict[str, Any]]) -> list[str]:
    """The cells of one row of the table."""
    tasks = [100 * statistics.fmean(record["tasks"].values()) for record in same if "tasks" in record]
    timed = [record for record in same if "seconds" in record]
    return [
        *(
            spread([r[name] for r in same], digits)
            for name, digits in (("wiki", 2), ("wiki_kl", 4), ("held_out", 2), ("held_out_kl", 4))
        ),
        spread(tasks, 1) if tasks else "",
        spread([r["timing"].get("solve", 0.0) for r in timed], 1) if timed else "",
        spread([r["seconds"] for r in timed], 0) if timed else "",
        str(len(same)),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a local Hugging Face folder")
    parser.add_argument("--table", metavar="RECORDS", help="print the records of a folder as a table, and stop")
    parser.add_argument("--calib", default="c4")
    parser.add_argument("--wiki", default="wikitext2", help="the first text for perplexity and KL")
    parser.add_argument("--held-out", default="c4", help="the second text")
    parser.add_argument("--data", help="folder with the files of the tasks; without it no tasks")
    parser.add_argument("--limit", type=int, help="rows of each task; default all")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--eval-seqlen", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, help="of the first text; default all")
    parser.add_argument("--max-held-out", type=int, help="of the second text; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--dtype", default="auto", help="of the passes while quantizing")
    parser.add_argument("--eval-dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so long")
    parser.add_argument("--records", default="records", help="folder for the records")
    options = parser.parse_args()
    if not options.table and not options.model:
        parser.error("MODEL is required")
    return options


if __name__ == "__main__":
    main()
