#!/usr/bin/env python3
"""NVFP4 and MXFP4 by method, weights alone and with inputs of the same format.

    python benchmarks/quality/floating_point.py MODEL --calib 'c4.txt@0:0.8' --wiki wikitext2-raw-test.txt \\
        --held-out 'c4.txt@0.8:1' --max-held-out 65536 --seconds 400 --records RECORDS
    python benchmarks/quality/floating_point.py --list  # the rows, for --rows 'NVFP4 W4A4 *'
    python benchmarks/quality/floating_point.py --table RECORDS  # the records as Markdown, mean +- spread over seeds

Rows come in the order of their weight, seed after seed; rows without calibration run with the first seed alone.
"""

from __future__ import annotations

from typing import Any

from bench import Row, main, table

HADAMARD = {"rotate": ("input",), "rotate_block": 32}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "nvfp4": {
        "CoreQ": {"method": "coreq"},
        "GPTQ": {"method": "gptq"},
        "RTN": {"method": "rtn", "scales": "minmax"},
        "RTN four-over-six": {"method": "rtn", "scales": "four_over_six"},
    },
    "mxfp4": {
        "CoreQ": {"method": "coreq"},
        "GPTQ": {"method": "gptq"},
        "RTN": {"method": "rtn", "scales": "even"},
        "RTN exponent search": {"method": "rtn", "scales": "mse"},
    },
}
MORE: dict[str, dict[str, dict[str, Any]]] = {  # what else is asked of a format, after the rows above
    "nvfp4": {
        "RTN scale search": {"method": "rtn"},
        "GPTQ min-max": {"method": "gptq", "scales": "minmax"},
        "GPTQ four-over-six": {"method": "gptq", "scales": "four_over_six"},
        "CoreQ four-over-six": {"method": "coreq", "scales": "four_over_six"},
        "GPTQ Hadamard": {"method": "gptq", **HADAMARD},
    },
    "mxfp4": {
        "RTN Hadamard": {"method": "rtn", "scales": "mse", **HADAMARD},
        "GPTQ Hadamard": {"method": "gptq", **HADAMARD},
        "CoreQ Hadamard": {"method": "coreq", **HADAMARD},
        "RTN floor": {"method": "rtn", "scales": "floor"},
        "RTN rceil": {"method": "rtn", "scales": "rceil"},
    },
}


def rows(seeds: list[int]) -> list[Row]:
    """All runs, the most important first."""
    first, others = seeds[0], seeds[1:]
    found = [row for inputs in (True, False) for row in _rows(METHODS, inputs, first)]
    for seed in others:
        for inputs in (True, False):
            found += [row for row in _rows(METHODS, inputs, seed) if row.fields["method"] != "rtn" or _drawn(row)]
    return found + [row for inputs in (True, False) for row in _rows(MORE, inputs, first)]


def _rows(table_of: dict[str, dict[str, dict[str, Any]]], inputs: bool, seed: int) -> list[Row]:
    found = []
    for number, methods in table_of.items():
        setting, act = f"{number.upper()} W4A16", {}
        if inputs:
            setting, act = f"{number.upper()} W4A4", {"act_format": number}
        found += [Row(setting, name, seed, {**fields, "format": number, **act}) for name, fields in methods.items()]
    return found


def _drawn(row: Row) -> bool:
    """Whether the draw of the calibration text matters although weights are rounded without it."""
    return row.fields.get("act_format") == "nvfp4"  # its tensor scale is from calibration


if __name__ == "__main__":
    main(__doc__, rows, table)
