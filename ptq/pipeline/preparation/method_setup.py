"""The method of a run, and everything that follows from its kind: which loop, which statistics, which data."""

from __future__ import annotations

import dataclasses
from typing import Any

from calib.stats import TWO_STREAMS, Stat
from ptq.learning import LearnedConfig
from ptq.methods import LayerMethod, find_method, make_config
from ptq.recipe import Recipe

__all__ = ["LayerSolver", "MethodSetup", "set_up_method"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSolver:
    """A layer-wise method with its options.

    Args:
        method: The method.
        config: Its options.
        needs: The statistics that it reads.
    """

    method: LayerMethod
    config: Any
    needs: frozenset[Stat]

    @property
    def full_inputs(self) -> bool:
        """Whether linears are quantized for the inputs that they have in the full-precision model."""
        return self.method.full_inputs(self.config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSetup:
    """The method of a run.

    Args:
        name: What users type.
        config: Its options.
        solver: What quantizes linear by linear: the method itself, or what a learned method starts from, if anything.
        learned: The options of a method that learns over windows of blocks; ``None`` for a layer-wise method.
        fallback: What a learned method's blocks start from where that is better than what ``solver`` makes.
        calibrates_inputs: Whether a scheme has inputs whose ranges are measured on calibration text.
    """

    name: str
    config: Any
    solver: LayerSolver | None
    learned: LearnedConfig | None = None
    fallback: LayerSolver | None = None
    calibrates_inputs: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether the run reads calibration text."""
        of_solver = self.solver is not None and bool(self.solver.needs)
        return self.learned is not None or of_solver or self.calibrates_inputs

    @property
    def compensates(self) -> bool:
        """Whether linears are solved one by one on statistics of their inputs."""
        return self.learned is None and self.solver is not None and bool(self.solver.needs)

    @property
    def full_inputs(self) -> bool:
        """Whether the calibration passes go through the full-precision model alone."""
        return self.learned is None and self.solver is not None and self.solver.full_inputs

    @property
    def fits_inputs(self) -> bool:
        """Whether the method finds the parameters of static input formats itself."""
        return self.learned is None and self.solver is not None and self.solver.method.fits_inputs

    @property
    def two_streams(self) -> bool:
        """Whether the full-precision model's activations are kept beside the quantized model's."""
        return self.learned is not None or (self.solver is not None and bool(self.solver.needs & TWO_STREAMS))

    @property
    def stores(self) -> int:
        """How many hidden states per token are kept: of both models, and the targets of a learned method's window."""
        return 2 if self.learned is None else 3


def set_up_method(recipe: Recipe) -> MethodSetup:
    """The method that a recipe names, with its options.

    Raises:
        UsageError: there is no such method, or an option does not exist or has a value that is refused.
    """
    method = find_method(recipe.method)
    config = make_config(method, recipe.options)
    static = any(scheme.calibrates_input for scheme in (recipe.scheme, *(scheme for _, scheme in recipe.overrides)))
    if isinstance(method, LayerMethod):
        return MethodSetup(name=method.name, config=config, solver=_solver(method, config), calibrates_inputs=static)
    named = _initial_method(config, recipe)
    learned = dataclasses.replace(config, init=named)
    fallback = _layer_solver("rtn") if named != config.init and named != "none" else None
    solver = None if named == "none" else _layer_solver(named)
    return MethodSetup(name=method.name, config=learned, solver=solver, learned=learned, fallback=fallback)


def _initial_method(config: LearnedConfig, recipe: Recipe) -> str:
    """The method whose result training starts from: what ``auto`` stands for here.

    Where inputs are rounded, channels are scaled while a method learns, and a rounding that was made for other channels
    is no good start.
    """
    if config.init != "auto":
        return config.init
    schemes = (recipe.scheme, *(scheme for _, scheme in recipe.overrides))
    rounds_inputs = recipe.kv_bits is not None or any(scheme.act_bits is not None for scheme in schemes)
    return "none" if rounds_inputs or config.scaling == "on" else "coreq"


def _layer_solver(name: str) -> LayerSolver:
    """A layer-wise method with its defaults."""
    method = find_method(name)
    assert isinstance(method, LayerMethod)
    return _solver(method, make_config(method, {}))


def _solver(method: LayerMethod, config: Any) -> LayerSolver:
    return LayerSolver(method=method, config=config, needs=method.needs(config))
