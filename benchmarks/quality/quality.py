#!/usr/bin/env python3
"""Quality of methods at equal schemes, calibration data and evaluation tokens: the tables of docs/results.

    python benchmarks/quality/quality.py MODEL --calib 'c4.txt@0:0.8' --wiki wikitext2-raw-test.txt \\
        --held-out 'c4.txt@0.8:1' \\
        --samples 64 --seqlen 512 --max-tokens 65536 --records RECORDS
    python benchmarks/quality/quality.py --table RECORDS  # the records as a Markdown table, mean +- spread over seeds

Every run leaves one JSON record and is skipped when its record is there, so that a table can be made in parts and by
several processes (``--shard 0/2``). The full model's predictions are kept on disk between runs.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptq
from evals import evaluate
from evals.record import TextResult
from ptq.api import make_recipe, resolve_device

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "gptaq .25": {"method": "gptaq", "strength": 0.25},
    "gptaq 1": {"method": "gptaq", "strength": 1.0},
    "coreq": {"method": "coreq"},
    "coreq beam 4": {"method": "coreq", "beam": 4},
    "coreq cd 2": {"method": "coreq", "cd_passes": 2},
    "coreq row": {"method": "coreq", "coefficient": "row"},
    "coreq js": {"method": "coreq", "coefficient": "js"},
    "coreq cv": {"method": "coreq", "coefficient": "cv"},
    "coreq .25": {"method": "coreq", "coefficient": "fixed", "alpha": 0.25},
    "coreq .5": {"method": "coreq", "coefficient": "fixed", "alpha": 0.5},
    "coreq 1": {"method": "coreq", "coefficient": "fixed", "alpha": 1.0},
    "coreq min-max": {"method": "coreq", "scales": "minmax"},
    "coreq hessian scales": {"method": "coreq", "scales": "hessian"},
    "coreq min-pivot": {"method": "coreq", "order": "min_pivot"},
}
SCHEMES: dict[str, dict[str, Any]] = {
    "W4 g64 asym": {"bits": 4, "group_size": 64, "symmetric": False, "scale_dtype": "float16"},
    "W3 g64 asym": {"bits": 3, "group_size": 64, "symmetric": False, "scale_dtype": "float16"},
    "W3 channel asym": {"bits": 3, "group_size": None, "symmetric": False, "scale_dtype": "float16"},
    "W2 g64 asym": {"bits": 2, "group_size": 64, "symmetric": False, "scale_dtype": "float16"},
    "W4 g64 sym": {"bits": 4, "group_size": 64},
    "W3 g64 sym": {"bits": 3, "group_size": 64},
    "W3 channel sym": {"bits": 3, "group_size": None},
    "W2 g64 sym": {"bits": 2, "group_size": 64},
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: what is quantized how, on which draw of the calibration text."""

    method: str
    scheme: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.method}__{self.scheme}__{self.seed}.json".replace(" ", "_")


def main() -> None:
    options = parse()
    if options.table:
        print(table(Path(options.table)))
        return
    bench = Bench(options)
    cells = [
        Cell(method, scheme, seed)
        for seed in options.seeds
        for scheme in options.schemes
        for method in options.methods
        if not (method == "rtn" and seed != options.seeds[0])  # no data: one seed says all
    ]
    part, parts = (int(x) for x in options.shard.split("/"))
    for cell in cells[part::parts]:
        target = Path(options.records) / cell.file
        if target.exists():
            continue
        record = bench.run(cell)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{cell}: {brief(record)}", file=sys.stderr, flush=True)


class Bench:
    """The full model and the machine, shared by all runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = resolve_device(options.device)
        self.dtype = getattr(torch, options.eval_dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=self.dtype)
        self.base = base.to(self.device).eval()

    def fields(self, cell: Cell) -> dict[str, Any]:
        """What is asked of ``ptq.quantize``, without the data."""
        return {**METHODS[cell.method], **SCHEMES[cell.scheme]}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Quantize, load and evaluate one cell."""
        recipe = make_recipe(
            {
                "calib": self.options.calib,
                **self.fields(cell),
                "calib_samples": self.options.samples,
                "calib_seqlen": self.options.seqlen,
                "seed": cell.seed,
                "compute_dtype": self.options.dtype,
            }
        )
        with tempfile.TemporaryDirectory(prefix="ptq-quality-") as folder:
            start = time.perf_counter()
            report = ptq.quantize(self.options.model, recipe, out=folder, device=str(self.device))
            seconds = time.perf_counter() - start
            model = ptq.load(folder, dtype=self.dtype).to(self.device).eval()
            result = self.evaluate(model)
        alphas = [layer.figures["alpha"] for layer in report.layers if "alpha" in layer.figures]
        return {
            "cell": dataclasses.asdict(cell),
            "bits_per_weight": report.totals["bits_per_weight"],
            "seconds": seconds,
            "timing": report.timing,
            "alpha_mean": statistics.fmean(alphas) if alphas else None,
            "losses": {layer.name: layer.loss for layer in report.layers},
            "recipe": report.recipe,
            "calibration": report.calibration,
            "environment": dict(report.environment) | {"platform": platform.platform(), "eval_dtype": str(self.dtype)},
            **result,
        }

    def evaluate(self, model: Any) -> dict[str, Any]:
        """KL and perplexity on the first text, perplexity on the held-out part of the second."""
        cut = {"seqlen": 2048, "bos": "never"}
        moved = evaluate(
            model,
            self.tokenizer,
            texts=[self.options.wiki],
            against=self.base,
            max_tokens=self.options.max_tokens,
            **cut,
        )
        (held,) = evaluate(
            model, self.tokenizer, texts=[self.options.held_out], max_tokens=self.options.max_held_out, **cut
        ).texts
        (wiki,), (base,) = moved.texts, moved.base.texts
        return {
            "wiki": wiki.perplexity or math.inf,
            "wiki_base": base.perplexity or math.inf,
            "wiki_segment_nll": segment_nll(wiki),
            "divergence": dataclasses.asdict(wiki.divergence),
            "held_out": held.perplexity or math.inf,
            "held_out_segment_nll": segment_nll(held),
            "scored_tokens": {"wiki": wiki.tokens, "held_out": held.tokens},
        }


def segment_nll(text: TextResult) -> list[float]:
    """Mean ``-ln p`` of every segment."""
    return [float(value) for value in text.items["nll"] / text.items["tokens"]]


def brief(record: dict[str, Any]) -> str:
    kl = record["divergence"]["kl_mean"]
    return (
        f"wiki {record['wiki']:.2f} held-out {record['held_out']:.2f} KL {kl:.3f} "
        f"bpw {record['bits_per_weight']:.3f} {record['seconds']:.0f} s"
    )


def table(folder: Path) -> str:
    """Markdown: a block a scheme, a row a method; mean and, with several seeds, standard deviation over seeds.

    The second text is scored on the segments that all records share. The last column pairs every record with coreq's on
    the same segments and seed: difference of the mean log-likelihood with its standard error over segments.
    """
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    shared = min(len(r["held_out_segment_nll"]) for r in records)
    lines = []
    for scheme in SCHEMES:
        rows = [r for r in records if r["cell"]["scheme"] == scheme]
        if not rows:
            continue
        reference = {r["cell"]["seed"]: r for r in rows if r["cell"]["method"] == "coreq"}
        lines += [
            f"\n**{scheme}**, {rows[0]['bits_per_weight']:.3f} bits a weight\n",
            "| method | WikiText-2 | held-out C4 | KL to the full model | top-1 | s | seeds | ln ratio to coreq |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in METHODS:
            same = [r for r in rows if r["cell"]["method"] == method]
            if same:
                columns = [
                    spread([r["wiki"] for r in same], 2),
                    spread([math.exp(statistics.fmean(r["held_out_segment_nll"][:shared])) for r in same], 2),
                    spread([r["divergence"]["kl_mean"] for r in same], 4),
                    spread([r["divergence"]["top1_agreement"] for r in same], 3),
                    spread([r["seconds"] for r in same], 0),
                    str(len(same)),
                    paired(same, reference),
                ]
                lines.append(f"| {method} | {' | '.join(columns)} |")
    return "\n".join(lines)


def paired(records: list[dict[str, Any]], reference: dict[int, dict[str, Any]]) -> str:
    """Mean over the seeds of the paired difference to coreq, and the mean of its standard errors."""
    means, errors = [], []
    for record in records:
        other = reference.get(record["cell"]["seed"])
        if other is None or other is record:
            continue
        pairs = zip(record["wiki_segment_nll"], other["wiki_segment_nll"], strict=True)
        differences = [mine - its for mine, its in pairs]
        means.append(statistics.fmean(differences))
        errors.append(statistics.stdev(differences) / math.sqrt(len(differences)))
    return f"{statistics.fmean(means):+.4f} (SE {statistics.fmean(errors):.4f})" if means else ""


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a local Hugging Face folder or a hub id")
    parser.add_argument("--table", metavar="RECORDS", help="print the records of a folder as a table, and stop")
    parser.add_argument("--calib", default="c4")
    parser.add_argument("--wiki", default="wikitext2", help="the text for perplexity and KL")
    parser.add_argument("--held-out", default="c4", help="the text to rank by")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, help="of the first text; default all")
    parser.add_argument("--max-held-out", type=int, help="of the second text; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:6])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES)[:4])
    parser.add_argument("--dtype", default="auto", help="of the passes while quantizing")
    parser.add_argument("--eval-dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--records", default="records", help="folder for the records")
    parser.add_argument("--shard", default="0/1", help="this process's part of the runs, e.g. 0/2 and 1/2")
    options = parser.parse_args()
    if not options.table and not options.model:
        parser.error("MODEL is required")
    return options


if __name__ == "__main__":
    main()
