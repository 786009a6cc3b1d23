"""Recipes from files of unknown origin: a `Recipe`, or a `UsageError` that says what is wrong. No other end."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptq.errors import PtqError, UsageError
from ptq.methods import METHODS, find_method, make_config
from ptq.recipe import CalibrationSpec, Recipe
from ptq.recipe_files.safe_yaml import MAX_YAML_BYTES, read_yaml
from ptq.scheme import Scheme

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
FULL = Recipe(
    "coreq",
    {"beam": 4, "damping": 0.02},
    Scheme(3, symmetric=False, group_size=None),
    overrides=(("*.down_proj", Scheme(4)), ("*.[0-3].*", Scheme(8, group_size=32))),
    ignore=("*.k_proj",),
    calibration=CalibrationSpec("text.txt", 4, 32, 1),
)


def read(path: Path, text: str | bytes) -> Recipe | None:
    """What ``--recipe`` does with a file: the recipe and its method's options, or ``None`` if it is refused."""
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    try:
        recipe = Recipe.from_yaml(path)
        make_config(find_method(recipe.method), recipe.options)
    except PtqError:
        return None
    return recipe


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe") / "recipe.yaml"


WORDS = st.text(max_size=8) | st.sampled_from(
    [
        "*",
        "&a",
        "*a",
        "<<",
        "!!python/name:os.system",
        "!!int",
        "2001-99-99",
        "1:2:3",
        ".nan",
        ".inf",
        "~",
        "0x",
        "1e999",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.binary(max_size=4) | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=5
)
KEYS = sorted({*FULL.to_dict(), *(f.name for f in dataclasses.fields(Scheme)), "source", "samples", "seed", "pattern"})


def test_the_whole_recipe_comes_back(file: Path) -> None:
    assert read(file, FULL.to_yaml()) == FULL


@given(st.sampled_from(sorted(METHODS)), st.integers(2, 8), st.booleans(), st.none() | st.integers(1, 512))
def test_written_recipes_are_read_back(file: Path, method: str, bits: int, symmetric: bool, group: int | None) -> None:
    recipe = Recipe(method, scheme=Scheme(bits, symmetric, group), overrides=(("*", Scheme(bits)),))
    assert read(file, recipe.to_yaml()) == recipe


@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3), st.data())
@FUZZ
def test_changed_values(file: Path, path: list[str], data: st.DataObject) -> None:
    recipe: Any = FULL.to_dict()
    place = recipe
    for key in path[:-1]:
        place = place[key] if isinstance(place.get(key), dict) else place
    place[path[-1]] = data.draw(VALUES)
    read(file, yaml.dump(recipe))


@given(st.data())
@FUZZ
def test_changed_text(file: Path, data: st.DataObject) -> None:
    text = FULL.to_yaml()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    read(file, text[:start] + data.draw(WORDS | st.sampled_from(["[", "{", "- ", "\n", ": ", "\t", "#"])) + text[end:])


@given(st.binary(max_size=200))
@FUZZ
def test_any_bytes(file: Path, content: bytes) -> None:
    read(file, content)


@given(
    st.sampled_from(sorted(METHODS)), st.dictionaries(WORDS | st.sampled_from(["beam", "damping"]), VALUES, max_size=2)
)
@FUZZ
def test_any_options(file: Path, method: str, options: dict[str, Any]) -> None:
    read(file, yaml.dump({"method": method, "options": options}))


TAGS = [
    "!!python/object/apply:os.system ['touch {0}']",
    "!!python/name:os.system",
    "!!int '3'",
    "!x y",
    "!!binary aGk=",
]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_are_refused_and_nothing_runs(tag: str, tmp_path: Path) -> None:
    path, witness = tmp_path / "recipe.yaml", tmp_path / "witness"
    path.write_text(f"method: {tag.format(witness)}\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml, line 1, column 9, has the tag"):
        Recipe.from_yaml(path)
    assert not witness.exists()


def test_aliases_are_refused_before_they_multiply(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    path.write_text("\n".join([*lines, "ignore: *a19"]))
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="anchor or alias 'a0'; write the value out"):
            Recipe.from_yaml(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_YAML_BYTES
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "more than 16 levels|maximum nesting depth"),  # ours, or libyaml's, whichever comes first
        ("- " * 100_000, "more than 16 levels"),
        ("method: rtn\nmethod: gptq", "line 2, column 1, has the key 'method' twice"),
        ("scheme: {bits: 3, bits: 4}", "the key 'bits' twice"),
        ("a: 1\n---\nb: 1", "not valid YAML"),
        ("", "is empty"),
        ("# a comment", "is empty"),
        ("{}", "is empty"),
        ("calibration:\n  seed: 2001-99-99", "line 2: calibration: calibration seed must be a whole number"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("method: 'rtn", "not valid YAML"),
        ("\0", "not valid YAML"),
        ("- rtn", "must be a mapping of keys to values, got list"),
        ("metod: rtn", "Did you mean 'method'"),
        ("scheme: {bitz: 3}", r"line 1: unknown key under 'scheme' 'bitz'. Did you mean 'bits'"),
        ("scheme: {wbits: 3}", r"line 1: there is no key 'wbits' under 'scheme'. ptq calls this scheme.bits."),
        ("scheme: {bits: 3.5}", "got 3.5"),
        ("calibration: {samples: .nan}", "got nan"),
        ("overrides: [{bits: 3}]", "needs a 'pattern'"),
    ],
)
def test_what_is_no_recipe_is_refused_with_the_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        Recipe.from_yaml(path)
    assert "recipe.yaml" in str(caught.value)


def test_a_recipe_beyond_the_limit_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(UsageError, match=f"larger than the limit of {MAX_YAML_BYTES} bytes"):
        read_yaml(path)
    with pytest.raises(UsageError, match="cannot read the recipe"):
        read_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("method: rtn\nscheme:\nbits: 4", 3, "does not stand at the top but under 'scheme': write scheme: {bits: 4}"),
        ("method: gptq\nseqlen: 64", 2, "under 'calibration': write calibration: {seqlen: 64}."),
        ("method: coreq\nbeam: 4", 2, "under 'options': write options: {beam: 4}."),
        ("scheme:\n  bits: 4\n  method: gptq", 3, "but at the top, beside 'method': write method: gptq."),
        ("calibration:\n  bits: 4", 2, "under 'scheme': write scheme: {bits: 4}."),
        ("method: rtn\nnsamples: 4", 2, "ptq calls this calibration.samples."),
        ("method: rtn\noutput_dir: x", 2, "That is no part of a recipe"),
        ("method: gptq\noptions:\n\n  damping: fast", 4, "gptq.damping is a float, got 'fast'"),
        ("method: coreq\noptions:\n  beam: 2\n  bean: 4", 4, "unknown option of coreq 'bean'. Did you mean 'beam'"),
        ("# x\nmethod: gtpq", 2, "Did you mean 'gptq'"),
        ("scheme:\n  symmetric: yes", 2, "symmetric must be true or false, got 'yes'"),
        ("scheme:\n  bits: 9\n  group_size: -1", 2, "bits must be a whole number from 2 to 8, got 9"),
        ("overrides:\n- {pattern: '*', bits: 3}\n- pattern: x\n  bits: 1", 4, "overrides[1]: bits must be"),
        ("overrides:\n- {pattern: '*', bits: 3}\n- {bits: 3}", 3, "overrides[1] needs a 'pattern'"),
        ("kv_bits: 8\nrotate:\n- down\n- up", 4, "unknown rotation 'up'"),
        ("ignore: lm_head", 1, "ignore must be a list"),
        ("method: 'rtn", 1, "is not valid YAML"),
    ],
)  # fmt: skip
def test_errors_say_file_line_and_what_to_write(text: str, line: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        Recipe.from_yaml(path)
    assert f"{path}, line {line}" in str(caught.value)
    assert message in str(caught.value)


def test_plain_values_are_those_of_yaml_1_2(file: Path) -> None:
    file.write_text(
        "{a: 1e-3, b: off, c: 010, d: 0x1F, e: 1:30, f: 2001-01-01, g: -1E+2, h: .5, i: yes, j: ~, k: true, l: -.inf, "
        "m: 0o17, n: 1., o: 1_000}"
    )
    assert read_yaml(file).data == {
        "a": 1e-3, "b": "off", "c": 10, "d": 31, "e": "1:30", "f": "2001-01-01", "g": -100.0, "h": 0.5, "i": "yes",
        "j": None, "k": True, "l": float("-inf"), "m": 15, "n": 1.0, "o": "1_000",
    }  # fmt: skip
    recipe = read(file, "method: omniquant\noptions: {lr_clip: 1e-3, scaling: off, intra: off}")
    assert recipe is not None
    assert recipe.options == {"lr_clip": 1e-3, "scaling": "off", "intra": "off"}
