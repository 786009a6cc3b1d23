"""Grids: the values a code can stand for, and how scales are fitted to a weight."""

from ptq.grids.grid import BoundGrid, Grid, uniform_grid
from ptq.grids.scale_search import SCALE_SEARCHES, ScaleSearch, fit_scales

__all__ = ["SCALE_SEARCHES", "BoundGrid", "Grid", "ScaleSearch", "fit_scales", "uniform_grid"]
