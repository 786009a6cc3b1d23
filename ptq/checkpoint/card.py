"""`add_card`: the model card among the files beside the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from calib.checkpoint.atomic_files import write_file
from ptq.checkpoint.writer import CheckpointWriter
from ptq.model_card import CARD_NAME, card_is_ours, render_card
from ptq.report import Report

__all__ = ["add_card"]


def add_card(checkpoint: CheckpointWriter, report: Report, source: Path | None) -> tuple[Report, str | None]:
    """Write the card of a result that is about to be finished.

    Args:
        checkpoint: the output folder.
        report: of the result.
        source: the folder of the source model, if it has one.

    Returns:
        The report with the card among its companions, and a sentence where a card of somebody else stays.

    Raises:
        OutputError: the card cannot be written.
    """
    if not card_is_ours(checkpoint.out):
        return report, f"{checkpoint.out / CARD_NAME} was not written by ptq and stays as it is"
    text = render_card(report, source)
    write_file(checkpoint.companions / CARD_NAME, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
    return dataclasses.replace(report, companions=tuple(checkpoint.companion_names())), None
