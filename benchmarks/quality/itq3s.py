#!/usr/bin/env python3
"""Quality of rotated 3-bit formats beside integers, at equal calibration and evaluation tokens.

    python benchmarks/quality/itq3s.py MODEL --calib 'c4.txt@0:0.8' --wiki wikitext2-raw-test.txt \\
        --held-out 'c4.txt@0.8:1' --records RECORDS
    python benchmarks/quality/itq3s.py --table RECORDS

One JSON record per run, the most important rows first; a run whose record is there is skipped, so an interrupted
benchmark goes on. ``--seconds`` starts no new run after that time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from quality import Bench, Cell, brief

INT3 = {"bits": 3, "group_size": 64, "symmetric": False, "scale_dtype": "float16"}
ITQ3S = {"method": "coreq", "format": "itq3s"}
REFITTED = {"cd_passes": 2, "refit_passes": 4}
NO_DATA = ("itq3s no data", "itq3s no data refitted", "itq3s no data unshaped", "int3 rtn", "int3 g128 rtn")
"""Rows without calibration: one seed says all."""
ROWS: dict[str, dict[str, Any]] = {
    "itq3s coreq min-pivot beam 4 refit": {**ITQ3S, "order": "min_pivot", "beam": 4, **REFITTED},
    "itq3s coreq": ITQ3S,
    "itq3s coreq refit": {**ITQ3S, **REFITTED},
    "itq3s coreq beam 4 cd 2": {**ITQ3S, "beam": 4, "cd_passes": 2},
    "itq3s coreq min-pivot beam 16 refit": {**ITQ3S, "order": "min_pivot", "beam": 16, **REFITTED},
    "itq3s gptq": {"method": "gptq", "format": "itq3s"},
    "int3 gptq": {"method": "gptq", **INT3},
    "int3 coreq": {"method": "coreq", **INT3},
    "int3 coreq beam 4": {"method": "coreq", **INT3, "beam": 4},
    "int3 coreq refit": {"method": "coreq", **INT3, **REFITTED},
    "itq3s no data": {"method": "itq3s", "calib": None},
    "int3 rtn": {"method": "rtn", **INT3},
    "int3 g128 rtn": {"method": "rtn", **INT3, "group_size": 128},
    "itq3s calib self": {**ITQ3S, "calib": "self"},
    "itq3s-104 coreq": {"method": "coreq", "format": "itq3s-104"},
    "itq3s-ternary coreq": {"method": "coreq", "format": "itq3s-ternary"},
    **{f"higgs {bits} coreq": {"method": "coreq", "format": "higgs", "bits": bits} for bits in (2, 3, 4)},
    **{
        f"itq3s coreq blocks of {block}": {**ITQ3S, "rotate": ("input",), "rotate_block": block}
        for block in (32, 64, 128, 512)
    },
    "int3 rotated coreq": {"method": "coreq", **INT3, "rotate": ("input",)},
    "itq3s coreq min-pivot": {**ITQ3S, "order": "min_pivot"},
    "itq3s coreq cd 2": {**ITQ3S, "cd_passes": 2},
    "itq3s coreq row": {**ITQ3S, "coefficient": "row"},
    "itq3s coreq damping .003": {**ITQ3S, "damping": 0.003},
    "itq3s coreq hessian scales": {**ITQ3S, "scales": "hessian"},
    "itq3s no data refitted": {"method": "itq3s", "calib": None, **REFITTED},
    "itq3s no data unshaped": {"method": "itq3s", "calib": None, "shaping": 0.0},
    "itq3s gptq dynamic scales": {"method": "gptq", "format": "itq3s", "act_order": False, "static_groups": False},
}


class RowBench(Bench):
    """`quality.Bench` for the rows here."""

    def fields(self, cell: Cell) -> dict[str, Any]:
        """What is asked of ``ptq.quantize``, without the data."""
        return ROWS[cell.method]


def main() -> None:
    options = parse()
    if options.table:
        print(table(Path(options.table)))
        return
    started, folder = time.monotonic(), Path(options.records)
    folder.mkdir(parents=True, exist_ok=True)
    bench = RowBench(options)
    for seed in options.seeds:
        for row in options.rows:
            cell = Cell(row, "itq3s", seed)
            target = folder / cell.file
            if target.exists() or (seed != options.seeds[0] and row in NO_DATA):
                continue
            if time.monotonic() - started > options.seconds:
                print(f"stopped before {row}, seed {seed}: run the same command again to go on", file=sys.stderr)
                return
            record = bench.run(cell)
            part = target.with_suffix(".part")
            part.write_text(json.dumps(record, indent=1) + "\n")
            part.replace(target)
            print(f"{row}, seed {seed}: {brief(record)}", file=sys.stderr, flush=True)


def table(folder: Path) -> str:
    """The records as Markdown."""
    lines = ["| weights | seed | bits per weight | WikiText-2 | held-out | KL | s |", "|---|---|---|---|---|---|---|"]
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for record in sorted(records, key=lambda r: r["divergence"]["kl_mean"]):
        cell = Cell(**record["cell"])
        lines.append(
            f"| {cell.method} | {cell.seed} | {record['bits_per_weight']:.3f} | {record['wiki']:.2f} | "
            f"{record['held_out']:.2f} | {record['divergence']['kl_mean']:.4f} | {record['seconds']:.0f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a local Hugging Face folder or a hub id")
    parser.add_argument("--table", metavar="RECORDS", help="print the records of a folder as a table, and stop")
    parser.add_argument("--calib", default="c4")
    parser.add_argument("--wiki", default="wikitext2", help="the text for perplexity and KL")
    parser.add_argument("--held-out", default="c4")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, help="of the first text; default all")
    parser.add_argument("--max-held-out", type=int, help="of the second text; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new run after this time")
    parser.add_argument("--dtype", default="auto", help="of the passes while quantizing")
    parser.add_argument("--eval-dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--records", default="records-itq3s")
    options = parser.parse_args()
    if not options.table and not options.model:
        parser.error("MODEL is required")
    return options


if __name__ == "__main__":
    main()
