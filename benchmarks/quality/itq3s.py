#!/usr/bin/env python3
"""Quality of rotated 3-bit formats beside integers, at equal calibration and evaluation tokens.

    python benchmarks/quality/itq3s.py MODEL --calib 'c4.txt@0:0.8' --wiki wikitext2-raw-test.txt \\
        --held-out 'c4.txt@0.8:1' --records RECORDS
    python benchmarks/quality/itq3s.py --table RECORDS

On a CPU a row of SmolLM2-135M takes minutes with

    --samples 16 --seqlen 512 --eval-seqlen 1024 --max-tokens 16384 --max-held-out 4096 \\
        --dtype float32 --eval-dtype float32 --seeds 0 --device cpu

One JSON record per run, the most important rows first; a run whose record is there is skipped, so an interrupted
benchmark goes on. ``--seconds`` starts no new run after that time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import Row, main, read_rows

INT3 = {"bits": 3, "group_size": 64, "symmetric": False, "scale_dtype": "float16"}
ITQ3S = {"method": "coreq", "format": "itq3s"}
REFITTED = {"cd_passes": 2, "refit_passes": 4}
NO_DATA = {"method": "itq3s", "calib": None}
SIBLINGS: dict[str, dict[str, Any]] = {
    "itq3s-104": {"format": "itq3s-104"},
    "itq3s-ternary": {"format": "itq3s-ternary"},
    **{f"higgs-{bits}": {"format": "higgs", "bits": bits} for bits in (2, 3, 4)},
}
BLOCKS: dict[str, dict[str, Any]] = {
    f"blocks of {block}": {"rotate": ("input",), "rotate_block": block} for block in (32, 64, 128, 512)
}
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
    "itq3s no data": NO_DATA,
    "int3 rtn": {"method": "rtn", **INT3, "calib": None},
    "int3 g128 rtn": {"method": "rtn", **INT3, "group_size": 128, "calib": None},
    "itq3s coreq calib self": {**ITQ3S, "calib": "self"},
    "itq3s gptq calib self": {"method": "gptq", "format": "itq3s", "calib": "self"},
    "itq3s rtn calib self hessian scales": {"method": "rtn", "format": "itq3s", "scales": "hessian", "calib": "self"},
    **{f"{name} coreq": {"method": "coreq", **fields} for name, fields in SIBLINGS.items()},
    **{f"itq3s coreq {name}": {**ITQ3S, **fields} for name, fields in BLOCKS.items()},
    **{f"{name} no data": {**NO_DATA, **fields} for name, fields in SIBLINGS.items()},
    **{f"itq3s no data {name}": {**NO_DATA, **fields} for name, fields in BLOCKS.items()},
    "int3 rotated coreq": {"method": "coreq", **INT3, "rotate": ("input",)},
    "itq3s coreq min-pivot": {**ITQ3S, "order": "min_pivot"},
    "itq3s coreq cd 2": {**ITQ3S, "cd_passes": 2},
    "itq3s coreq row": {**ITQ3S, "coefficient": "row"},
    "itq3s coreq damping .003": {**ITQ3S, "damping": 0.003},
    "itq3s coreq hessian scales": {**ITQ3S, "scales": "hessian"},
    "itq3s no data refitted": {**NO_DATA, **REFITTED},
    "itq3s no data unshaped": {**NO_DATA, "shaping": 0.0},
    "itq3s gptq dynamic scales": {"method": "gptq", "format": "itq3s", "act_order": False, "static_groups": False},
}


def rows(seeds: list[int]) -> Iterator[Row]:
    """All runs, seed after seed, the most important first; those without data once."""
    for seed in seeds:
        for name, fields in ROWS.items():
            if seed == seeds[0] or fields.get("calib", "") is not None:
                number, _, method = name.partition(" ")
                yield Row(number, method, seed, fields)


def table(folder: Path) -> str:
    """The records as Markdown, all formats in one table by KL."""
    lines = ["| weights | seed | bits per weight | WikiText-2 | held-out | KL | s |", "|---|---|---|---|---|---|---|"]
    for record in sorted(read_rows(folder), key=lambda r: r["wiki_divergence"]["kl_mean"]):
        cell = record["cell"]
        lines.append(
            f"| {cell['setting']} {cell['method']} | {cell['seed']} | {record['bits_per_weight']:.3f} | "
            f"{record['wiki']:.2f} | {record['held_out']:.2f} | {record['wiki_divergence']['kl_mean']:.4f} | "
            f"{record['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, rows, table)
