"""Which calibration sequences are learned on, and which are held out to decide what is kept."""

from __future__ import annotations

import dataclasses

from ptq.learning.config import LearnedConfig

__all__ = ["FEWEST_SEQUENCES", "DataSplit", "split_sequences"]

_FEWEST_HELD_OUT = 2
FEWEST_SEQUENCES = 2 * _FEWEST_HELD_OUT
"""Fewer sequences than these are not divided."""


@dataclasses.dataclass(frozen=True)
class DataSplit:
    """How calibration sequences are divided.

    Args:
        batch: Sequences in a step's batch of one process.
        held_out: Sequences that are held out, the last ones; 0 if none are.
        reason: In words.
    """

    batch: int
    held_out: int
    reason: str


def split_sequences(config: LearnedConfig, sequences: int, processes: int = 1) -> DataSplit:
    """Hold out the config's fraction of the sequences, at least two, and a few more if that makes all batches of the
    others equal; these have at most the config's size.

    Args:
        config: What is learned.
        sequences: Of the calibration data, of all processes together.
        processes: That share them.
    """
    if not config.holdout:
        return DataSplit(config.batch, 0, "nothing is held out (holdout=0): the loss on all sequences decides")
    wanted = max(_FEWEST_HELD_OUT, int(config.holdout * sequences))
    if sequences < FEWEST_SEQUENCES or sequences - wanted < processes:
        reason = (
            f"{sequences} calibration sequences are too few to hold some out: the loss on the sequences that are "
            f"learned on decides what is kept, which favours learning. {2 * FEWEST_SEQUENCES} or more are better."
        )
        return DataSplit(config.batch, 0, reason)
    batches = max(processes, -(-(sequences - wanted) // config.batch))
    batch = (sequences - wanted) // batches
    held_out = sequences - batches * batch
    reason = (
        f"learning on {sequences - held_out} of {sequences} calibration sequences, {batch} a step; the loss on the "
        f"other {held_out} decides what is kept"
    )
    return DataSplit(batch, held_out, reason)
