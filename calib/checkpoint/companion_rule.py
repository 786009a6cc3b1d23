"""Which files of a model's folder may go along with its tensors."""

from __future__ import annotations

import dataclasses

__all__ = ["CompanionRule"]


@dataclasses.dataclass(frozen=True)
class CompanionRule:
    """Which files of a model's folder may go along beside the weights.

    Args:
        code: Python files too, because the user allowed the model's code to run.
        text_only: not those that prepare images, video or sound.
    """

    code: bool = False
    text_only: bool = False
