"""Presets against the schemes of the same names in compressed-tensors."""

from __future__ import annotations

import pytest
from compressed_tensors.quantization import preset_name_to_scheme

from ptq.api import make_recipe
from ptq.errors import UsageError
from ptq.presets import PRESETS, find_preset
from ptq.scheme import Scheme


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_scheme_of_that_name(name: str) -> None:
    scheme, theirs = make_recipe({"preset": name}).scheme, preset_name_to_scheme(name, ["Linear"])
    assert scheme == Scheme.of(**PRESETS[name])
    assert theirs.weights is not None
    assert scheme.bits == theirs.weights.num_bits
    assert (scheme.format not in ("int", "int8")) == (theirs.weights.type == "float")
    wanted = theirs.weights.group_size or (128 if theirs.weights.strategy == "block" else None)
    assert scheme.group_size == wanted
    inputs = theirs.input_activations
    assert (inputs is None) == (scheme.activation_format is None)
    if inputs is not None and scheme.activation_format is not None:
        assert scheme.activation_format.bits == inputs.num_bits
        assert scheme.activation_format.block == inputs.group_size
        assert scheme.activation_format.static == (inputs.dynamic is not True)


def test_what_a_preset_leaves_open_is_set_beside_it() -> None:
    assert make_recipe({"preset": "w4a16", "group_size": 32}).scheme.group_size == 32
    assert make_recipe({"preset": "NVFP4", "bits": 4, "format": "nvfp4"}).scheme == Scheme.of(**PRESETS["NVFP4"])
    base = make_recipe({"preset": "NVFP4"})
    assert make_recipe({"preset": "W4A16"}, base).scheme.act_format is None
    assert make_recipe({"preset": "NVFP4"}, make_recipe({"act_bits": 8})).scheme == base.scheme
    with pytest.raises(UsageError, match="Did you mean 'NVFP4'"):
        find_preset("NVFP")


@pytest.mark.parametrize(
    ("preset", "fields", "wanted"),
    [
        ("NVFP4", {"format": "fp8"}, "the preset NVFP4 has format='nvfp4', and format='fp8' .--format. contradicts it"),
        ("NVFP4", {"act_format": None}, "leave one of them out, or take the preset NVFP4A16"),
        ("nvfp4", {"act_bits": 8}, "the preset NVFP4 has act_bits=None, and act_bits=8"),
        ("W4A16", {"bits": 8}, "or take the preset W8A16"),
        ("W4A16", {"act_bits": 8}, "contradicts it"),
        ("NVFP4", {"group_size": 32}, "nvfp4 has group_size=16, got 32"),
    ],
)
def test_what_contradicts_a_preset_is_refused(preset: str, fields: dict[str, object], wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted):
        make_recipe({"preset": preset, **fields})


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"format": "fp8_dynamic"}, "'fp8_dynamic' is not a number format: that is a preset, given as --preset FP8_DY"),
        ({"format": "e4m3-static"}, "that is an activation format, given as --act-format e4m3-static"),
        ({"preset": "fp8-tensor"}, "'fp8-tensor' is not a preset: that is a number format, given as --format"),
        ({"method": "nvfp4"}, "not a method: that is a number format, given as --format nvfp4"),
        ({"method": "GPTQ"}, "Did you mean 'gptq'[?] Known"),
        ({"method": "llm_fp4"}, "Did you mean 'llm-fp4'[?]"),
        ({"format": "NVFP4"}, "Did you mean 'nvfp4'[?]"),
    ],
)
def test_a_name_in_the_wrong_place_or_case(fields: dict[str, object], wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted):
        make_recipe(fields)
