"""What a scheme and a recipe say of run time: limits, names, and plain data that old readers know."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq.api import make_recipe
from ptq.errors import UsageError
from ptq.recipe import Recipe
from ptq.scheme import Scheme

SCHEMES = st.builds(
    lambda bits, act, sign, seed: Scheme(bits, act_bits=act, act_symmetric=sign and bool(act), input_rotation=seed),
    st.integers(2, 8),
    st.none() | st.integers(2, 8),
    st.booleans(),
    st.none() | st.integers(0, 2**63 - 1),
)


@given(SCHEMES)
def test_plain_data_round_trips(scheme: Scheme) -> None:
    data = scheme.to_dict()
    assert Scheme.from_dict(data) == scheme
    assert data.keys() == {field.name for field in dataclasses.fields(Scheme)}
    assert scheme.record() == data | {"name": scheme.describe()}
    assert Scheme.from_dict(scheme.record()) == scheme
    assert scheme.transforms_input == (scheme.act_bits is not None or scheme.input_rotation is not None)


def test_a_recipe_writes_all_its_fields() -> None:
    assert set(Recipe().to_dict()) == {field.name for field in dataclasses.fields(Recipe)}
    assert Recipe.from_dict(Recipe().to_dict()) == Recipe()


def test_a_number_format_brings_its_defaults() -> None:
    assert Scheme.of("fp4") == Scheme(4, True, 32, "float16", format="fp4")
    assert Scheme.of("fp4", group_size=16).describe() == "fp4 g16"
    assert Scheme.from_dict({"format": "fp4"}) == Scheme.of("fp4")
    with pytest.raises(UsageError, match=r"unknown number format 'fp5'\. Did you mean .*'fp4'"):
        Scheme.of("fp5")
    with pytest.raises(UsageError, match="fp4 has 4 bits, got bits=3"):
        Scheme.of("fp4", bits=3)
    with pytest.raises(UsageError, match="no zero points"):
        Scheme.of("fp4", symmetric=False)


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (Scheme(3), "int3 sym g64"),
        (Scheme(4, False, None, act_bits=4), "int4 asym per channel a4"),
        (Scheme(4, act_bits=8, act_symmetric=True), "int4 sym g64 a8 sym"),
        (Scheme(4, act_bits=4, input_rotation=0), "int4 sym g64 a4 rotated"),
        (Scheme(4, input_rotation=3), "int4 sym g64 rotated"),
    ],
)
def test_describe(scheme: Scheme, text: str) -> None:
    assert scheme.describe() == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_bits": 1}, r"act_bits must be a whole number from 2 to 8, or None .* got 1"),
        ({"act_bits": 16}, "got 16"),
        ({"act_bits": True}, "got True"),
        ({"act_bits": "4"}, "got '4'"),
        ({"act_bits": 4, "act_symmetric": 1}, "act_symmetric must be true or false, got 1"),
        ({"act_symmetric": True}, r"act_bits \(--act-bits\) is not set: give both"),
        ({"input_rotation": -1}, r"input_rotation must be a seed .* got -1"),
        ({"input_rotation": True}, "got True"),
        ({"input_rotation": 2**63}, "got 9223372036854775808"),
    ],
)
def test_schemes_out_of_their_limits(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Scheme(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_bits": 9}, "kv_bits must be a whole number from 2 to 8"),
        ({"kv_symmetric": True}, r"kv_bits \(--kv-bits\) is not set: give both"),
        ({"kv_bits": 4, "kv_symmetric": "yes"}, "kv_symmetric must be true or false, got 'yes'"),
        ({"rotate": ("residul",)}, r"unknown rotation 'residul'\. Did you mean 'residual'"),
        ({"rotate": ([],)}, "unknown rotation"),
        ({"rotate": "residual"}, "rotate must be a list of rotations"),
    ],
)
def test_recipes_out_of_their_limits(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**fields)


def test_a_recipe_file_carries_all_of_it(tmp_path: Path) -> None:
    recipe = Recipe(
        scheme=Scheme(4, act_bits=4),
        overrides=(("*.down_proj", Scheme(8, act_bits=8, act_symmetric=True, input_rotation=1)),),
        kv_bits=4,
        kv_symmetric=True,
        rotate=("down", "residual"),
    )
    assert recipe.rotate == ("residual", "down")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    (tmp_path / "short.yaml").write_text("rotate: [down, down]\nkv_bits: 8\n")
    assert Recipe.from_yaml(tmp_path / "short.yaml") == Recipe(rotate=("down",), kv_bits=8)
    (tmp_path / "bad.yaml").write_text("rotate: down\n")
    with pytest.raises(UsageError, match=r"rotate must be a list"):
        Recipe.from_yaml(tmp_path / "bad.yaml")


def test_flat_names_reach_scheme_and_recipe() -> None:
    recipe = make_recipe({"act_bits": 4, "act_symmetric": True, "kv_bits": 8, "rotate": ["residual"], "bits": 4})
    assert recipe == Recipe(scheme=Scheme(4, act_bits=4, act_symmetric=True), kv_bits=8, rotate=("residual",))
