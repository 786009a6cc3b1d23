"""The record of `families.py` as lines for people: one on the terminal per family, and a markdown table."""

from __future__ import annotations

from typing import Any

__all__ = ["MAX_DISTANCE", "summary", "table"]

MAX_DISTANCE = 1e-3  # relative distance of logits in float32


def summary(row: dict[str, Any]) -> str:
    if row["status"] != "tried":
        return f"{row['status']} {row.get('problem', '')}"[:150]
    parts = []
    for name in ("symmetric", "asymmetric"):
        one = row[name]
        parts.append(f"{name}: {one['status']} {one.get('format', '')} {one.get('problem', '')}"[:140].strip())
    return "; ".join(parts)


def table(record: dict[str, Any]) -> str:
    """The record as markdown: counts, then every family in one line."""
    lines = ["| family | symmetric | stock | with ptq | zero points, with ptq |", "|---|---|---|---|---|"]
    for family, row in sorted(record["families"].items()):
        if row["status"] != "tried":
            lines.append(f"| {family} | {row['status']}: {cell(row.get('problem', ''))} | | | |")
            continue
        one, other = row["symmetric"], row["asymmetric"]
        shown = one.get("format") or f"{one['status']}: {cell(one['problem'])}"
        lines.append(
            f"| {family} | {shown} | {reading(one, 'stock')} | {reading(one, 'ptq')} | {reading(other, 'ptq')} |"
        )
    return "\n".join(lines) + "\n"


def reading(row: dict[str, Any], reader: str) -> str:
    if row["status"] in ("refused", "failed", "not compared"):
        return "" if reader == "stock" else f"{row['status']}: {cell(row['problem'])}"
    if reader not in row:
        return ""
    found = row[reader]
    if "distance" not in found:
        return f"fails: {cell(found.get('problem') or found.get('status', ''))}"
    return "equal" if found["distance"] <= MAX_DISTANCE else f"off by {found['distance']:.2g}"


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]
