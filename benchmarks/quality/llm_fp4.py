#!/usr/bin/env python3
"""LLM-FP4's table: min-max integers, min-max floats, search and shifts alone, and LLM-FP4 at W4A4, W4A8 and W4A16.

    python benchmarks/quality/llm_fp4.py MODEL --calib 'c4.txt@0:0.8' --wiki wikitext2-raw-test.txt \\
        --held-out 'c4.txt@0.8:1' --data TASKS --records RECORDS --seconds 340
    python benchmarks/quality/llm_fp4.py --list  # the rows, for --rows 'W4A4 *' 'W4A16 LLM-FP4'
    python benchmarks/quality/llm_fp4.py --table RECORDS  # the records as Markdown, mean +- spread over seeds

The most important rows come first: all of W4A4 with the first seed and their tasks, the other widths, more seeds, then
the other ways (folded, sequential) and GPTQ beside them for its seconds.
"""

from __future__ import annotations

from typing import Any

from bench import Row, main, table

_PLAIN = {"search": False, "shift": "off"}
MAIN: dict[str, dict[str, Any]] = {
    "LLM-FP4": {},
    "searched FP": {"shift": "off"},
    "MinMax FP": _PLAIN,
    "MinMax INT": _PLAIN | {"weight_formats": "e1m2"},  # E1M2 is INT4 without its lowest code
    "shift without search": {"search": False},
}
OTHERS: dict[str, dict[str, Any]] = {
    "LLM-FP4 sequential": {"sequential": True},
    "LLM-FP4 folded": {"shift": "folded"},
    "LLM-FP4 E2M1": {"weight_formats": "e2m1", "act_formats": "e2m1"},
}
INTEGERS = {4: "e1m2", 8: "e1m6"}
NEED_INPUTS = (
    "searched FP",
    "shift without search",
)  # at W4A16 there are no shifts: LLM-FP4 and MinMax FP say the same
GPTQ = {"method": "gptq", "bits": 4, "group_size": None}
TASKS = ("arc_easy", "arc_challenge", "piqa", "openbook_qa", "copa")


def rows(seeds: list[int]) -> list[Row]:
    """All runs, the most important first."""
    first, others = seeds[0], seeds[1:]
    found = [Row("full", "full", first, {}, TASKS)]
    found += [_row(method, 4, first, TASKS) for method in MAIN]
    found += [_row(method, bits, first) for bits in (16, 8) for method in _methods(bits)]
    found += [_row(method, 4, seed) for seed in others for method in MAIN]
    found += [Row("W4A16", "GPTQ", first, GPTQ), *(_row(method, 4, first) for method in OTHERS)]
    return found + [_row(method, bits, seed) for bits in (16, 8) for seed in others for method in _methods(bits)]


def _methods(act_bits: int) -> list[str]:
    return [method for method in MAIN if act_bits != 16 or method not in NEED_INPUTS]


def _row(method: str, act_bits: int, seed: int, tasks: tuple[str, ...] = ()) -> Row:
    fields = {"method": "llm-fp4", "bits": 4, "act_bits": act_bits, **(MAIN | OTHERS)[method]}
    if method == "MinMax INT" and act_bits != 16:
        fields["act_formats"] = INTEGERS[act_bits]
    return Row(f"W4A{act_bits}", method, seed, fields, tasks)


if __name__ == "__main__":
    main(__doc__, rows, table)
