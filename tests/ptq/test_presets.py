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


def test_what_is_given_beside_a_preset_wins() -> None:
    assert make_recipe({"preset": "w4a16", "group_size": 32}).scheme.group_size == 32
    assert make_recipe({"preset": "NVFP4", "act_format": None}).scheme == Scheme.of("nvfp4")
    base = make_recipe({"preset": "NVFP4"})
    assert make_recipe({"preset": "W4A16"}, base).scheme.act_format is None
    with pytest.raises(UsageError, match="Did you mean 'NVFP4'"):
        find_preset("NVFP")
