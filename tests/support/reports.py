"""A report with nothing in it, for tests of what lies around reports."""

from __future__ import annotations

from typing import Any

from ptq.report import Report

__all__ = ["empty_report"]


def empty_report(container: str, **fields: Any) -> Report:
    """A report of no layers.

    Args:
        container: Its container.
        fields: What it has all the same.
    """
    empty: dict[str, Any] = {
        "model": {},
        "recipe": {},
        "calibration": None,
        "container": container,
        "container_reason": "",
        "layers": (),
        "kept": (),
        "totals": {},
        "timing": {},
        "environment": {},
    }
    return Report(**(empty | fields))
