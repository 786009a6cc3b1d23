"""Grids: the values a code can stand for, and how scales are fitted to a weight."""

from ptq.grids.grid import Grid, ScaledGrid, uniform_grid
from ptq.grids.scale_search import SCALE_SEARCHES, ScaleSearch, fit_scales
from ptq.grids.storage import MAX_BITS, MIN_BITS, SCALE_DTYPES, Storage

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "SCALE_DTYPES",
    "SCALE_SEARCHES",
    "Grid",
    "ScaleSearch",
    "ScaledGrid",
    "Storage",
    "fit_scales",
    "uniform_grid",
]
