"""Tables of levels for weights whose entries look Gaussian, which a random rotation makes them.

Every codebook here is symmetric, so it is named by the magnitudes of its levels.
"""

from __future__ import annotations

import torch

from ptq.grids.grid import Grid

__all__ = ["GAUSSIAN", "ITQ3_MAGNITUDES", "TERNARY_MAGNITUDES", "symmetric_levels"]

GAUSSIAN: dict[int, tuple[float, ...]] = {
    2: (0.45278003463649225, 1.5104176084990968),
    3: (0.24509417894422184, 0.7560052812058784, 1.3439092785050009, 2.151945704536988),
    4: (
        0.12839502985114726,
        0.38804829949029185,
        0.6567591185324662,
        0.9423404564869652,
        1.2562311973471798,
        1.6180463860218839,
        2.0690172265313898,
        2.7325895709951866,
    ),
}
"""Magnitudes of the levels with the least squared error on N(0, 1) (Lloyd-Max), by bits; the grids of scalar HIGGS
(arXiv 2411.17525)."""

ITQ3_MAGNITUDES = (1.0, 3.0, 5.0, 8.0)
"""Integers within 2 % of the least squared error of three bits: every level is exact in int8 and in FP8."""

TERNARY_MAGNITUDES = (0.0, 1.0)


def symmetric_levels(magnitudes: tuple[float, ...], device: torch.device | None = None) -> Grid:
    """The grid of ``+-m`` for every magnitude ``m``, ascending; a magnitude of 0 is one level."""
    positive = torch.tensor(magnitudes, dtype=torch.float32, device=device)
    return Grid(torch.cat((-positive.flip(0)[: len(positive) - (magnitudes[0] == 0)], positive)))
