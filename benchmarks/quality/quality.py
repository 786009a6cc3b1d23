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
import statistics
import sys
from pathlib import Path
from typing import Any

import bench
from bench import brief, spread

__all__ = ["Bench", "Cell", "brief", "spread"]

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
    measured = Bench(options)
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
        record = measured.run(cell)
        bench.write(target, record)
        print(f"{cell}: {brief(record)}", file=sys.stderr, flush=True)


class Bench(bench.Bench):
    """`bench.Bench` for the cells here."""

    def fields(self, cell: Cell) -> dict[str, Any]:
        """What is asked of ``ptq.quantize``, without the data."""
        return {**METHODS[cell.method], **SCHEMES[cell.scheme]}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Quantize, load and evaluate one cell."""
        record = self.measure(dataclasses.asdict(cell), self.fields(cell), cell.seed)
        return record | {"divergence": record["wiki_divergence"]}


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


def parse() -> argparse.Namespace:
    parser = bench.arguments(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:6])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES)[:4])
    parser.add_argument("--shard", default="0/1", help="this process's part of the runs, e.g. 0/2 and 1/2")
    return bench.parsed(parser)


if __name__ == "__main__":
    main()
