"""The runs of learning.py as literal tables, and how a run becomes flags of ``ptq quantize``.

A cell says what decides its result, and is named by that; the same cell in two tables is run once. Schedules that
visit blocks less often get more steps, so that all do the same work: steps count for the slider, and others get them
times the slider's block visits over theirs, rounded up in their favour.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from calib.runner.window_schedule import make_windows, visits

SETTINGS: dict[str, dict[str, Any]] = {
    "W2 g64": {"bits": 2, "group_size": 64},
    "W3 channel": {"bits": 3, "group_size": 0},
    "W4A4": {"bits": 4, "group_size": 0, "act_bits": 4, "kv_bits": 4},
    "W4A4 rotated": {"bits": 4, "group_size": 0, "act_bits": 4, "kv_bits": 4, "rotate": "residual"},
    "W3 g64": {"bits": 3, "group_size": 64},
    "W3 g64 sym": {"bits": 3, "group_size": 64, "symmetric": True},
    "W3 g64 sym rotated": {"bits": 3, "group_size": 64, "symmetric": True, "rotate": "residual,down"},
    "W4 g64": {"bits": 4, "group_size": 64},
    "W4 g128": {"bits": 4, "group_size": 128},
    "W4 g128 sym": {"bits": 4, "group_size": 128, "symmetric": True},
}
"""Fields as on the command line; ``group_size`` 0 is per channel; asymmetric where nothing is said."""

SLIDER_ITERS = 100
PUBLISHED_EPOCHS = {"W2 g64": 60}  # 20 elsewhere
OMNIQUANT_EPOCHS = {"W2 g64": 40}  # 20 elsewhere
AUTOROUND_ITERS = 200
WITHOUT_DATA = ("rtn",)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way to quantize.

    Args:
        setting: of `SETTINGS`; method: of ``ptq methods``.
        options: of the method, ``(name, value)``.
        matched: ``epochs`` are those of the slider, to be scaled by block visits.
    """

    setting: str
    method: str
    options: tuple[tuple[str, str | int], ...] = ()
    matched: bool = False

    @property
    def key(self) -> str:
        """What names the cell in records and files."""
        said = [f"{name}-{value}" for name, value in self.options] + ["matched"] * self.matched
        return "__".join([self.setting, self.method, *said]).replace(" ", "_")

    @property
    def seeded(self) -> bool:
        """Whether the seed decides anything: the data, or a rotation."""
        return self.method not in WITHOUT_DATA or "rotate" in SETTINGS[self.setting]

    @property
    def learned(self) -> bool:
        """Whether it has epochs or iterations to scale."""
        return any(name in ("epochs", "iters") for name, _ in self.options)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells by their labels; ``name/label`` is what ``--cells`` chooses by."""

    name: str
    rows: dict[str, Cell]


def slider(setting: str, schedule: str = "slider", intra: str = "off", **more: str | int) -> Cell:
    """SliderQuant with everything said that the tables vary; from the ranges of the weights if nothing is said."""
    named: dict[str, str | int] = {"schedule": schedule, "intra": intra, "iters": SLIDER_ITERS, "init": "none", **more}
    return Cell(setting, "sliderquant", tuple(named.items()), matched=schedule != "slider")


def _weights(setting: str) -> Table:
    """Weight-only: layer-wise methods, learned methods, and learning on top of a good rounding."""
    return Table(
        setting,
        {
            "gptq": Cell(setting, "gptq"),
            "coreq": Cell(setting, "coreq"),
            "sliderquant": slider(setting),
            "sliderquant on coreq": slider(setting, init="coreq"),
            "sliderquant as published": _published(setting),
            "omniquant": Cell(setting, "omniquant", (("epochs", OMNIQUANT_EPOCHS.get(setting, 20)),)),
            "autoround": _autoround(setting),
        },
    )


def _published(setting: str) -> Cell:
    """SliderQuant with its own learnables, optimizer and curriculum."""
    options = (("epochs", PUBLISHED_EPOCHS.get(setting, 20)), ("init", "none"), ("holdout", 0))
    return Cell(setting, "sliderquant-lora", options)


def _autoround(setting: str) -> Cell:
    return Cell(setting, "autoround", (("iters", AUTOROUND_ITERS), ("batch", 8)))


def _autoround_as_published(setting: str) -> Cell:
    """What Intel's package does: from the ranges of the weights, on all sequences, all steps, the best loss kept."""
    options = (("iters", AUTOROUND_ITERS), ("batch", 8), ("init", "none"), ("holdout", 0), ("max_passes", 0))
    return Cell(setting, "autoround", options)


def _activations(setting: str) -> Table:
    return Table(
        setting,
        {
            "rtn": Cell(setting, "rtn"),
            "sliderquant": slider(setting),
            "sliderquant, fixed windows": slider(setting, "fixed"),
            "sliderquant as published": _published(setting),
        },
    )


def _ablation(setting: str) -> Table:
    """Plain windows, and each part by itself and together; ``single`` is one block after another."""
    rows = {
        "single blocks": slider(setting, "single"),
        "plain windows": slider(setting, "fixed"),
        "+ expanding": slider(setting, "expanding"),
        "+ contracting": slider(setting, "contracting"),
        "+ both": slider(setting),
        "+ curriculum": slider(setting, "fixed", "sweep"),
        "all": slider(setting, intra="sweep"),
        "all, curriculum in every window": slider(setting, intra="window"),
    }
    return Table(f"ablation {setting}", rows)


def _coreq(setting: str) -> Table:
    """What makes coreq differ from seed to seed: tokens with huge inputs, scales, damping, the coefficient."""
    rows = {
        "default": Cell(setting, "coreq"),
        "bounded": Cell(setting, "coreq", (("outliers", "bounded"),)),
        "bounded with hessian scales": Cell(setting, "coreq", (("outliers", "bounded"), ("scales", "hessian"))),
        "hessian scales": Cell(setting, "coreq", (("scales", "hessian"),)),
        "row": Cell(setting, "coreq", (("coefficient", "row"),)),
        "cv": Cell(setting, "coreq", (("coefficient", "cv"),)),
        "damping 0.001": Cell(setting, "coreq", (("damping", "0.001"),)),
        "min_pivot": Cell(setting, "coreq", (("order", "min_pivot"),)),
    }
    return Table(f"coreq {setting}", rows)


def _little(setting: str) -> Table:
    """For ``--samples 8`` to 128 and ``--seqlen 512``: learning beside what it starts from."""
    rows = {
        "coreq": Cell(setting, "coreq"),
        "sliderquant": Cell(setting, "sliderquant"),
        "sliderquant (start from training data)": Cell(setting, "sliderquant", (("init_data", "training"),)),
        "sliderquant from nothing": Cell(setting, "sliderquant", (("init", "none"),)),
        "autoround": Cell(setting, "autoround"),
    }
    return Table(f"little {setting}", rows)


def _best(setting: str) -> Table:
    """The best at the same bits on a CPU's budget: rotation and a few steps from coreq."""
    quick = (("schedule", "single"), ("iters", 25), ("init", "coreq"))
    rows = {
        "coreq": Cell(setting, "coreq"),
        "coreq bounded": Cell(setting, "coreq", (("outliers", "bounded"),)),
        "sliderquant 25 steps": Cell(setting, "sliderquant", quick),
        "sliderquant 25 steps (start from training data)": Cell(
            setting, "sliderquant", (*quick, ("init_data", "training"))
        ),
        "sliderquant": Cell(setting, "sliderquant"),
        "sliderquant (start from training data)": Cell(setting, "sliderquant", (("init_data", "training"),)),
    }
    return Table(f"best {setting}", rows)


TABLES = (
    _weights("W2 g64"),
    _weights("W3 channel"),
    _activations("W4A4"),
    _activations("W4A4 rotated"),
    _ablation("W2 g64"),
    _ablation("W4A4"),
    *(_coreq(setting) for setting in ("W2 g64", "W3 g64", "W4 g64")),
    *(_little(setting) for setting in ("W2 g64", "W3 g64")),
    *(_best(setting) for setting in ("W3 g64 sym", "W3 g64 sym rotated")),
    Table(
        "autoround",  # beside peers/autoround_reference.py
        {
            f"{setting}{' as published' * published}": (_autoround_as_published if published else _autoround)(setting)
            for setting in ("W3 g64", "W3 g64 sym", "W4 g128", "W4 g128 sym")
            for published in (False, True)
        },
    ),
)


def arguments(cell: Cell, blocks: int, epochs_scale: float) -> dict[str, Any]:
    """Everything that decides the result but the data: ``method``, ``options``, ``bits``, ``group_size``, ..."""
    options = dict(cell.options)
    for name in ("epochs", "iters"):
        if name in options:
            exact = int(options[name]) * epochs_scale * visit_ratio(cell, blocks)
            options[name] = max(1, math.ceil(exact - 1e-9)) if options[name] else 0
    fields = {"symmetric": False, **SETTINGS[cell.setting]}
    return {"setting": cell.setting, "method": cell.method, "options": options, **fields}


def visit_ratio(cell: Cell, blocks: int) -> float:
    """Block visits of the slider over those of the cell's schedule, where epochs are matched."""
    if not cell.matched:
        return 1.0
    schedule = str(dict(cell.options)["schedule"])
    return sum(visits(make_windows("slider", blocks))) / sum(visits(make_windows(schedule, blocks)))


def quantize_flags(fields: dict[str, Any]) -> list[str]:
    """``arguments`` as flags of ``ptq quantize``; scales in float16, as all methods of all toolkits have them."""
    flags = ["--method", fields["method"], "--sym" if fields["symmetric"] else "--asym", "--scale-dtype", "float16"]
    for name in ("bits", "group_size", "act_bits", "kv_bits", "rotate"):
        if name in fields:
            flags += ["--" + name.replace("_", "-"), str(fields[name])]
    for name, value in fields["options"].items():
        flags += ["-O", f"{name}={value}"]
    return flags


def file_name(cell: Cell, seed: int, epochs_scale: float) -> str:
    """Of the record; runs without epochs have the same at every scale."""
    scale = "" if epochs_scale == 1 or not cell.learned else f"__epochs-x{epochs_scale:g}"
    return f"{cell.key}{scale}__seed-{seed}.json"
