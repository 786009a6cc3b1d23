"""What the benchmarks of quality share: the full model, a run and its record, the rows asked for, arguments.

Every run leaves one JSON record as soon as it is done and is skipped when its record is there, so the same command goes
on where it was cut. Rows come in the order of their weight.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptq
from evals import evaluate
from evals.record import TextResult
from ptq.api import make_recipe, resolve_device
from ptq.errors import PtqError

EVAL_SEQLEN = 2048


@dataclasses.dataclass(frozen=True)
class Row:
    """One run: a setting and how it is quantized in it, on which draw of the calibration text."""

    setting: str
    method: str
    seed: int
    fields: dict[str, Any] = dataclasses.field(compare=False)  # of `ptq.quantize`, without the data; none: full model
    tasks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What ``--rows`` is matched with."""
        return f"{self.setting} {self.method}"

    @property
    def file(self) -> str:
        """Name of its record."""
        return f"{self.setting}__{self.method}__{self.seed}.json".replace(" ", "_").replace("+", "and")

    @property
    def cell(self) -> dict[str, Any]:
        """What the record says about it."""
        return {"setting": self.setting, "method": self.method, "seed": self.seed}


class Bench:
    """The full model and the machine, shared by all runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = resolve_device(options.device)
        self.dtype = getattr(torch, options.eval_dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=self.dtype)
        self.base = base.to(self.device).eval()

    def measure(
        self, cell: dict[str, Any], fields: dict[str, Any], seed: int, tasks: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Quantize, load and evaluate one cell; without fields evaluate the full model."""
        environment = {"platform": platform.platform(), "eval_dtype": str(self.dtype)}
        if not fields:
            return {"cell": cell, "environment": environment, **self.evaluate(self.base, tasks)}
        data = {"calib": self.options.calib, "calib_samples": self.options.samples}
        data |= {"calib_seqlen": self.options.seqlen}
        if fields.get("calib", "") is None:  # a row without data
            data, fields = {}, {key: value for key, value in fields.items() if key != "calib"}
        data |= {"seed": seed, "compute_dtype": self.options.dtype}
        with tempfile.TemporaryDirectory(prefix="ptq-quality-") as folder:
            start = time.perf_counter()
            report = ptq.quantize(self.options.model, make_recipe(data | fields), out=folder, device=str(self.device))
            seconds = time.perf_counter() - start
            model = ptq.load(folder, dtype=self.dtype).to(self.device).eval()
            result = self.evaluate(model, tasks)
        alphas = [layer.figures["alpha"] for layer in report.layers if "alpha" in layer.figures]
        return {
            "cell": cell,
            "bits_per_weight": report.totals["bits_per_weight"],
            "seconds": seconds,
            "timing": report.timing,
            "alpha_mean": statistics.fmean(alphas) if alphas else None,
            "losses": {layer.name: layer.loss for layer in report.layers},
            "layers": {layer.name: {"scheme": layer.scheme, "figures": layer.figures} for layer in report.layers},
            "recipe": report.recipe,
            "calibration": report.calibration,
            "environment": dict(report.environment) | environment,
            **result,
        }

    def evaluate(self, model: Any, tasks: tuple[str, ...] = ()) -> dict[str, Any]:
        """KL to the full model and perplexity on both texts, and the tasks' accuracies."""
        found: dict[str, Any] = {}
        for name, text, limit in (
            ("wiki", self.options.wiki, self.options.max_tokens),
            ("held_out", self.options.held_out, self.options.max_held_out),
        ):
            scored = evaluate(
                model,
                self.tokenizer,
                texts=[text],
                against=self.base,
                seqlen=self.options.eval_seqlen,
                bos="never",
                max_tokens=limit,
            )
            (result,), (base,) = scored.texts, scored.base.texts
            found |= {
                name: result.perplexity or math.inf,
                f"{name}_base": base.perplexity or math.inf,
                f"{name}_segment_nll": segment_nll(result),
                f"{name}_divergence": dataclasses.asdict(result.divergence),
                f"{name}_tokens": result.tokens,
            }
        if tasks:
            scored = evaluate(model, self.tokenizer, list(tasks), data=self.options.data, limit=self.options.task_limit)
            found["tasks"] = {task.name: task.metrics[task.metric]["value"] for task in scored.tasks}
        return found


def main(doc: str | None, rows: Callable[[list[int]], Iterable[Row]], table: Callable[[Path], str]) -> None:
    """A benchmark made of rows: run those that are asked for, or show the table of a folder of records.

    Args:
        doc: the program's docstring, which is its help.
        rows: all of them, for the seeds.
        table: the Markdown of a folder.
    """
    options = parsed(row_arguments(doc))
    if options.table:
        print(table(Path(options.table)))
    else:
        run_rows(rows(options.seeds), options)


def run_rows(rows: Iterable[Row], options: argparse.Namespace) -> None:
    """All chosen rows that have no record yet, until the time is up."""
    chosen = [row for row in rows if _asked(row, options.rows)]
    if options.list:
        print("\n".join(dict.fromkeys(row.name for row in chosen)))
        return
    if not chosen:
        sys.exit(f"no row is called {' or '.join(options.rows)}: --list names all")
    started, folder = time.monotonic(), Path(options.records)
    todo = [row for row in chosen if not (folder / row.file).exists()]
    bench = Bench(options) if todo else None
    for row in todo:
        if time.monotonic() - started > options.seconds:
            print(f"time is up before {row.name}, seed {row.seed}: the same command goes on", file=sys.stderr)
            return
        try:
            record = bench.measure(row.cell, row.fields, row.seed, row.tasks if options.data else ())
        except PtqError as error:  # one row that cannot run must not take the others along
            print(f"{row.name}, seed {row.seed}: {error}", file=sys.stderr, flush=True)
            continue
        write(folder / row.file, record)
        print(f"{row.name}, seed {row.seed}: {brief(record)}", flush=True)


def _asked(row: Row, patterns: Sequence[str] | None) -> bool:
    name = row.name.lower()
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern.lower()) for pattern in patterns)


def write(target: Path, record: dict[str, Any]) -> None:
    """The record, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_suffix(".half")
    half.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    half.replace(target)


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """All records of `run_rows` in a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*__*.json"))]


def table(folder: str | Path) -> str:
    """Markdown: a block per setting, a row per method in order of KL; mean and standard deviation over seeds."""
    records, lines = read_rows(folder), []
    for setting in dict.fromkeys(record["cell"]["setting"] for record in records):
        rows = [record for record in records if record["cell"]["setting"] == setting]
        lines += [
            f"\n**{setting}**, full model {rows[0]['wiki_base']:.2f} and {rows[0]['held_out_base']:.2f}\n",
            "| method | bits per weight | WikiText-2 | KL | held-out | KL | tasks, % | solve s | all s | seeds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        methods: dict[str, list[dict[str, Any]]] = {}
        for record in rows:
            methods.setdefault(record["cell"]["method"], []).append(record)
        for method, same in sorted(methods.items(), key=lambda item: -_mean_kl(item[1])):
            lines.append(f"| {method} | {' | '.join(_columns(same))} |")
    return "\n".join(lines)


def _mean_kl(same: list[dict[str, Any]]) -> float:
    return statistics.fmean(record["wiki_divergence"]["kl_mean"] for record in same)


def _columns(same: list[dict[str, Any]]) -> list[str]:
    tasks = [100 * statistics.fmean(record["tasks"].values()) for record in same if "tasks" in record]
    timed = [record for record in same if "seconds" in record]
    return [
        f"{same[0]['bits_per_weight']:.3f}" if timed else "",
        *(text for name in ("wiki", "held_out") for text in _text_columns(same, name)),
        spread(tasks, 1) if tasks else "",
        spread([record["timing"].get("solve", 0.0) for record in timed], 1) if timed else "",
        spread([record["seconds"] for record in timed], 0) if timed else "",
        str(len(same)),
    ]


def _text_columns(same: list[dict[str, Any]], name: str) -> list[str]:
    divergences = [record[f"{name}_divergence"]["kl_mean"] for record in same]
    return [spread([record[name] for record in same], 2), spread(divergences, 4)]


def segment_nll(text: TextResult) -> list[float]:
    """Mean ``-ln p`` of every segment."""
    return [float(value) for value in text.items["nll"] / text.items["tokens"]]


def spread(values: list[float], digits: int) -> str:
    """The mean and, with several values, their standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def brief(record: dict[str, Any]) -> str:
    """A line about a record."""
    tasks = f" tasks {100 * statistics.fmean(record['tasks'].values()):.1f} %" if "tasks" in record else ""
    cost = f" bpw {record['bits_per_weight']:.3f} {record['seconds']:.0f} s" if "seconds" in record else ""
    return (
        f"wiki {record['wiki']:.2f} KL {record['wiki_divergence']['kl_mean']:.4f} "
        f"held-out {record['held_out']:.2f} KL {record['held_out_divergence']['kl_mean']:.4f}{tasks}{cost}"
    )


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What all benchmarks of quality are asked: model, texts, sizes, machine."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a local Hugging Face folder or a hub id")
    parser.add_argument("--table", metavar="RECORDS", help="print the records of a folder as a table, and stop")
    parser.add_argument("--calib", default="c4")
    parser.add_argument("--wiki", default="wikitext2", help="the first text for perplexity and KL")
    parser.add_argument("--held-out", default="c4", help="the second text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--eval-seqlen", type=int, default=EVAL_SEQLEN, help="of the segments of both texts")
    parser.add_argument("--max-tokens", type=int, help="of the first text; default all")
    parser.add_argument("--max-held-out", type=int, help="of the second text; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dtype", default="auto", help="of the passes while quantizing")
    parser.add_argument("--eval-dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--records", default="records", help="folder for the records")
    return parser


def row_arguments(description: str | None) -> argparse.ArgumentParser:
    """`arguments` and what `run_rows` reads beside them."""
    parser = arguments(description)
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="rows whose whole name matches, as '* W4A4 *'")
    parser.add_argument("--list", action="store_true", help="print the names of the chosen rows, and stop")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so long")
    parser.add_argument("--data", help="folder with the files of the tasks; without it no tasks")
    parser.add_argument("--task-limit", type=int, help="rows of each task; default all")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; a model is needed unless there is only something to print."""
    options = parser.parse_args()
    if not (options.table or options.model or getattr(options, "list", False)):
        parser.error("MODEL is required")
    return options
