#!/usr/bin/env python3
"""What rotations of the residual stream and of down_proj's inputs bring or cost, at equal bits, tokens and seeds.

    python benchmarks/quality/rotations.py MODEL --calib 'c4.txt@0:0.8' --wiki wikitext2-raw-test.txt \\
        --held-out 'c4.txt@0.8:1' --records RECORDS
    python benchmarks/quality/rotations.py --table RECORDS

One JSON record per run, the most important rows first; a run whose record is there is skipped, so an interrupted
benchmark goes on. ``--seconds`` starts no new run after that time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import Row, main, read_rows

SCHEMES: dict[str, dict[str, Any]] = {
    "W3 g64 sym": {"bits": 3, "group_size": 64, "symmetric": True},
    "W4 g128 sym": {"bits": 4, "group_size": 128, "symmetric": True},
    "W2 g64 asym": {"bits": 2, "group_size": 64, "symmetric": False},
    "W4 g64 asym": {"bits": 4, "group_size": 64, "symmetric": False},
    "W3 channel asym": {"bits": 3, "group_size": None, "symmetric": False},
    "W8 channel sym": {"bits": 8, "group_size": None, "symmetric": True},
}
ROTATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "residual,down": ("residual", "down"),
    "residual": ("residual",),
}
METHODS = ("coreq", "rtn", "gptq")


def rows(seeds: list[int]) -> Iterator[Row]:
    """All runs, seed after seed, method after method."""
    for seed in seeds:
        for method in METHODS:
            for setting, scheme in SCHEMES.items():
                for name, rotate in ROTATIONS.items():
                    if method == "rtn" and not rotate and seed != seeds[0]:
                        continue  # nothing is drawn
                    fields = {"method": method, **scheme, "scale_dtype": "float16", "container": "native"}
                    fields |= {"rotate": rotate} | ({"calib": None} if method == "rtn" else {})
                    yield Row(setting, f"{method} {name}", seed, fields)


def table(folder: Path) -> str:
    """The records as Markdown, scheme after scheme."""
    lines = [
        "| weights | method, rotations | seed | WikiText-2 | KL | held-out | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in sorted(read_rows(folder), key=lambda r: (r["cell"]["setting"], r["cell"]["method"])):
        cell = record["cell"]
        kl = [record[f"{text}_divergence"]["kl_mean"] for text in ("wiki", "held_out")]
        lines.append(
            f"| {cell['setting']} | {cell['method']} | {cell['seed']} | {record['wiki']:.2f} | {kl[0]:.4f} | "
            f"{record['held_out']:.2f} | {kl[1]:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, rows, table)
