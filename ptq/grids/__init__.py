"""Grids: the values a code can stand for, and how scales are fitted to a weight."""

from ptq.grids.grid import SMALLEST_STEP, Grid, ScaledGrid, check_finite, uniform_grid
from ptq.grids.scale_search import SCALE_SEARCHES, ScaleSearch, fit_scales
from ptq.grids.storage import MAX_BITS, MIN_BITS, SCALE_DTYPES, Storage

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "SCALE_DTYPES",
    "SCALE_SEARCHES",
    "SMALLEST_STEP",
    "Grid",
    "ScaleSearch",
    "ScaledGrid",
    "Storage",
    "check_finite",
    "fit_scales",
    "uniform_grid",
]
