"""The names that `ptq` promises, held to reality: what is exported, what is documented, what the signatures are."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import calib
import cli
import evals
import ptq
import ptq.errors

ROOT = Path(__file__).parents[1]
PROMISED = {
    "METHODS",
    "Calibration",
    "CalibrationSpec",
    "Event",
    "Forecast",
    "LayerMethod",
    "LayerRecord",
    "Plan",
    "PtqError",
    "QuantizedWeight",
    "Recipe",
    "Report",
    "Scheme",
    "forecast",
    "load",
    "load_calibration",
    "plan",
    "quantize",
}


def test_ptq_exports_exactly_what_it_promises() -> None:
    assert set(ptq.__all__) == PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_promised_names_exist_and_explain_themselves(name: str) -> None:
    value = getattr(ptq, name)
    assert not callable(value) or inspect.getdoc(value), f"ptq.{name} has no docstring"


def test_quantize_takes_a_model_a_recipe_and_keywords() -> None:
    parameters = inspect.signature(ptq.quantize).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    assert list(kinds)[:2] == ["model", "recipe"]
    expected = {"out", "tokenizer", "calibration", "device", "on_event", "trust_remote_code"}
    assert expected <= {name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY}


def test_the_error_tree_is_the_same_under_both_names() -> None:
    for name in ptq.errors.__all__:
        assert getattr(ptq.errors, name) is getattr(calib.errors, name)


def test_exit_codes_are_distinct_and_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    kinds = [ptq.errors.PtqError, *ptq.errors.PtqError.__subclasses__()]
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert f"| {kind.exit_code} | `{kind.__name__}` |" in page


@pytest.mark.parametrize("package", [calib, cli, evals, ptq], ids=lambda package: package.__name__)
def test_packages_are_typed_and_documented(package: object) -> None:
    assert inspect.getdoc(package), "a package says in a line what it is"
    (folder,) = package.__path__  # type: ignore[attr-defined]
    assert (Path(folder) / "py.typed").is_file()


def test_importing_ptq_prints_nothing_and_touches_no_random_state() -> None:
    code = "import torch; before = torch.get_rng_state(); import ptq; assert before.equal(torch.get_rng_state())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_module_can_be_imported_where_there_is_no_fcntl_and_no_resource() -> None:
    """Neither exists on Windows. What other packages import of them here, on Linux, they import before."""
    code = """
import importlib, pkgutil, sys
import accelerate, compressed_tensors, datasets, filelock, psutil, torch, transformers
sys.modules["fcntl"] = sys.modules["resource"] = None
for root in ("calib", "ptq", "evals", "cli"):
    for module in pkgutil.walk_packages(importlib.import_module(root).__path__, f"{root}."):
        importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
