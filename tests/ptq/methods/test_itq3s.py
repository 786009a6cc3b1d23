"""ITQ3_S from a model to a folder and back: shaping without data, solvers with it, rotated inputs, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ptq
from calib.data.tokens import Calibration
from cli.main import main
from ptq.api import make_recipe
from ptq.errors import NumericalError, UsageError
from ptq.methods import LayerMethod, find_method, make_config
from ptq.methods.layerwise.itq3s import guessed_hessian
from ptq.pipeline.preparation.effects import without_effect
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Rotation, Scheme
from ptq.transforms.hadamard import InputRotation
from tests.support.tiny_models import tiny_model

TOKENS = torch.arange(16).reshape(2, 8)
CALIBRATION = Calibration(torch.randint(0, 60, (4, 32), generator=torch.Generator().manual_seed(0)), "test", 1, "none")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of itq3s."""
    folder = tmp_path_factory.mktemp("stored") / "out"
    ptq.quantize(tiny_model("llama"), out=folder, device="cpu", method="itq3s")
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


def rounded(weight: Tensor, **options: Any) -> Tensor:
    """The values that the method stores for ``weight``, rotated back."""
    method = find_method("itq3s")
    assert isinstance(method, LayerMethod)
    scheme = Scheme.of("itq3s")
    assert scheme.input_rotation is not None
    rotation = InputRotation.of(scheme.input_rotation, weight.shape[1])
    result = method.quantize(rotation.on_weight(weight), None, scheme, make_config(method, options), {})
    return rotation.inverse(result.weight.dequantize())


def test_small_columns_get_small_errors() -> None:
    """Inputs are largest where weights are smallest: an even error would be as large as these weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator)
    weight[:, ::8] /= 8
    plain, shaped = ((rounded(weight, shaping=p) - weight).square().mean(0) for p in (0.0, 1.0))
    assert shaped[::8].mean() < 0.3 * plain[::8].mean()
    assert shaped.mean() < 2 * plain.mean()
    sizes = 1 / weight.square().mean(0)
    assert (shaped * sizes).sum() < 0.7 * (plain * sizes).sum()


def test_the_guessed_hessian_is_diagonal_before_the_rotation() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    rotation = InputRotation(64, 0, 32)
    found = guessed_hessian(rotation.on_weight(weight), rotation, 1.0)
    back = rotation.inverse(rotation.inverse(found).T)
    expected = torch.diag(weight.square().mean() / weight.square().mean(0))
    torch.testing.assert_close(back, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "itq3s"},
        {"method": "itq3s", "calibration": CALIBRATION},
        {"method": "itq3s", "calibration": CALIBRATION, "solver": "gptq"},
        {"method": "coreq", "format": "itq3s-104", "calibration": CALIBRATION, "beam": 2},
        {"method": "rtn", "format": "itq3s-ternary", "scales": "minmax"},
        {
            "method": "gptq",
            "format": "higgs",
            "bits": 2,
            "calibration": CALIBRATION,
            "act_order": False,
            "static_groups": False,
        },
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values() if not isinstance(value, Calibration)),
)
def test_a_model_is_stored_loaded_saved_and_run(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = tiny_model("llama")
    report = ptq.quantize(model, out=tmp_path / "out", device="cpu", **fields)
    names = {layer.scheme["name"] for layer in report.layers}
    expected = {"itq3s": "itq3s", "higgs": "higgs2"}.get(fields.get("format", "itq3s"), fields.get("format"))
    assert names == {f"{expected} rotated"}
    loaded = ptq.load(tmp_path / "out")
    assert (report.calibration is not None) == ("calibration" in fields)
    q = loaded.model.layers[0].self_attn.q_proj
    assert isinstance(q, QuantLinear)
    rotation = q.scheme.input_rotation
    assert rotation is not None
    assert rotation == Rotation(rotation.seed, 256)
    first = logits(loaded)
    limit = 1.2 if expected in ("itq3s-ternary", "higgs2") else 0.3
    assert 0 < (first - logits(model)).square().mean() / logits(model).square().mean() < limit
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(ptq.load(tmp_path / "again")), first)


def test_three_and_an_eighth_bits_are_shown(tmp_path: Path) -> None:
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(2))
    bits = {
        name: Scheme.of(name).number_format.payload_bits(4, 512, Scheme.of(name)) / weight.numel()
        for name in ("itq3s", "itq3s-104", "itq3s-ternary", "higgs")
    }
    assert bits == {"itq3s": 3.125, "itq3s-104": 3.25, "itq3s-ternary": 3.125, "higgs": 4.0625}


def test_every_input_is_rotated_for_any_method(tmp_path: Path) -> None:
    model = tiny_model("llama")
    report = ptq.quantize(
        model, out=tmp_path / "out", device="cpu", method="rtn", bits=8, rotate=("input",), rotate_block=32, seed=7
    )
    rotations = [layer.scheme["input_rotation"] for layer in report.layers]
    assert all(rotation == {"seed": rotation["seed"], "block": 32, "kind": "hadamard"} for rotation in rotations)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["schemes"]
    assert all(scheme["input_rotation"] in rotations for scheme in stored.values())
    torch.testing.assert_close(logits(ptq.load(tmp_path / "out")), logits(model), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_signs_are_one_draw_per_input_from_the_seed_of_the_run(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    drawn = []
    for seed in (0, 1):
        out = tmp_path / str(len(drawn))
        report = ptq.quantize(model, out=out, device="cpu", method="itq3s", seed=seed)
        drawn.append({layer.name: layer.scheme["input_rotation"]["seed"] for layer in report.layers})
        loaded = ptq.load(out)
        stored = {n: m.scheme.input_rotation for n, m in loaded.named_modules() if isinstance(m, QuantLinear)}
        assert {name: rotation.seed for name, rotation in stored.items() if rotation} == drawn[-1]
    first, other = drawn
    assert not set(first.values()) & set(other.values())
    block = "model.layers.0"
    assert len({first[f"{block}.self_attn.{name}_proj"] for name in "qkv"}) == 1
    if kind == "mixtral":
        inputs = {(n.split(".")[2], n.rsplit(".", 1)[1] in ("w2", "down_proj")) for n in first if ".experts." in n}
        assert len({first[n] for n in first if ".experts." in n}) == len(inputs)
    else:
        assert first[f"{block}.mlp.gate_proj"] == first[f"{block}.mlp.up_proj"]
    assert len(set(first.values())) == 4 * model.config.num_hidden_layers


def test_a_rotation_asked_for_by_number_keeps_it(tmp_path: Path) -> None:
    report = ptq.quantize(
        tiny_model("llama"),
        out=tmp_path / "out",
        device="cpu",
        method="rtn",
        bits=8,
        overrides=(("*.o_proj", Scheme(8, input_rotation=Rotation(5, 64))),),
    )
    drawn = {layer.name.rsplit(".", 1)[1]: layer.scheme["input_rotation"] for layer in report.layers}
    assert drawn["o_proj"] == {"seed": 5, "block": 64, "kind": "hadamard"}
    assert drawn["q_proj"] is None


def test_a_loaded_model_rotates_each_input_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ptq.quantize(model, out=tmp_path / "out", device="cpu", method="itq3s")
    loaded, calls = ptq.load(tmp_path / "out"), []
    whole = InputRotation.__call__
    monkeypatch.setattr(InputRotation, "__call__", lambda self, x: calls.append(1) or whole(self, x))
    logits(loaded)
    assert len(calls) == 4 * model.config.num_hidden_layers


def test_linears_with_one_input_rotate_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation, calls = InputRotation(64, 0, 32), []
    whole = InputRotation.__call__
    monkeypatch.setattr(InputRotation, "__call__", lambda self, x: calls.append(1) or whole(self, x))
    x = torch.randn(3, 64)
    first = rotation.once(x)
    assert rotation.once(x) is first
    assert len(calls) == 1
    x[0] = 0.0
    assert not torch.equal(rotation.once(x), first)
    rotation.once(torch.randn(3, 64))
    assert len(calls) == 3
    with torch.inference_mode():
        torch.testing.assert_close(rotation.once(torch.ones(2, 64)), whole(rotation, torch.ones(2, 64)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 4}, "itq3s has codes of 3 bits, got bits=4"),
        ({"symmetric": False}, "itq3s is a symmetric codebook and has no zero points: leave out --asym"),
        ({"group_size": 64}, "itq3s has one scale per 256 input channels, got group_size=64"),
        ({"scale_dtype": "bfloat16"}, "itq3s stores its scales in float16, got scale_dtype='bfloat16'"),
        ({"input_rotation": {"block": 48}}, r"must be one of 32, 64, 128, 256, 512, 1024; got 48"),
        ({"input_rotation": {"kind": "dct"}}, "kind of input rotation 'dct'"),
        ({"input_rotation": {"sign": 1}}, "key of input_rotation 'sign'"),
        ({"input_rotation": {"kind": "hadamard-unsigned", "seed": 1}}, "without signs has the seed 0"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Scheme.of("itq3s", **fields)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beam": 2}, "beam=2 belongs to a solver with calibration data: give --calib"),
        ({"order": "natural"}, "order=natural belongs to a solver with calibration data"),
        ({"damping": 0.1}, "damping=0.1 belongs to a solver with calibration data"),
        ({"solver": "gptq", "beam": 2}, "beam=2 belongs to another solver: give solver=coreq"),
        ({"solver": "gptq", "shaping": 0.5}, "shaping=0.5 belongs to another solver"),
        ({"solver": "coreq", "shaping": 0.5}, "shaping=0.5 belongs to solver=none"),
        ({"scales": "hessian"}, "scales=hessian needs calibration data"),
        ({"shaping": 3.0}, "shaping is 0 to 2, got 3.0"),
        ({"solver": "ldl"}, "solver 'ldl'"),
    ],
    ids=str,
)
def test_options_of_a_solver_that_does_not_run_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_config(find_method("itq3s"), options)


@pytest.mark.parametrize("name", ["itq3s", "itq3s-104", "higgs", "itq3s-ternary"])
def test_codebooks_take_only_their_own_searches_of_scales(name: str, tmp_path: Path) -> None:
    """The range of a codebook is not that of its largest weight; the paper's ternary step is the exception."""
    run = {"out": tmp_path / "out", "device": "cpu", "method": "rtn", "format": name, "scales": "minmax"}
    if name == "itq3s-ternary":
        assert ptq.quantize(tiny_model("llama"), **run).layers
        return
    with pytest.raises(UsageError, match=f"{name} takes scales=pnorm, hessian, got 'minmax'"):
        ptq.quantize(tiny_model("llama"), **run)


def test_the_size_of_blocks_can_be_chosen_for_a_format_that_rotates(tmp_path: Path) -> None:
    fields = {"method": "itq3s", "rotate_block": 32, "seed": 3}
    own = (("*.o_proj", Scheme.of("itq3s", input_rotation=Rotation(5, 128))),)
    report = ptq.quantize(tiny_model("llama"), out=tmp_path / "out", device="cpu", overrides=own, **fields)
    blocks = {layer.name.rsplit(".", 1)[1]: layer.scheme["input_rotation"]["block"] for layer in report.layers}
    assert blocks.pop("o_proj") == 128
    assert set(blocks.values()) == {32}
    assert without_effect(fields, make_recipe(fields)) == {}
    assert set(without_effect(fields, make_recipe({**fields, "format": "int"}))) == {"rotate_block", "seed"}


def test_narrow_linears_are_named(tmp_path: Path) -> None:
    model = tiny_model("mixtral", intermediate_size=24)
    with pytest.raises(UsageError, match=r"down_proj \(64 x 24\) .* at least 32.*--ignore '\*\.down_proj'") as caught:
        ptq.quantize(model, out=tmp_path / "out", device="cpu", method="itq3s")
    pattern = str(caught.value).split("--ignore '")[1].split("'")[0]
    report = ptq.quantize(model, out=tmp_path / "out", device="cpu", method="itq3s", ignore=(pattern,))
    assert {layer.name.rsplit(".", 1)[1] for layer in report.layers} == {
        *(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up"))
    }
    reason = Scheme.of("itq3s").number_format.unsupported_reason(8, 16, Scheme.of("itq3s"))
    assert reason == "it has 16 input channels, and blocks of this format need at least 32"


def test_a_weight_below_all_scales_is_named_without_data(tmp_path: Path) -> None:
    """float16 has no scale for it, all of it becomes zeros; blocks of zeros are stored as such and lose nothing."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-20)
        model.model.layers[1].mlp.up_proj.weight.zero_()
    report = ptq.quantize(model, out=tmp_path / "out", device="cpu", method="itq3s")
    assert report.warnings == (
        "model.layers.0.mlp.up_proj: 100% of the weight's energy is lost: the scheme does not fit this weight",
    )
    assert logits(ptq.load(tmp_path / "out")).isfinite().all()


def test_weights_that_are_no_numbers_are_refused() -> None:
    weight = torch.randn(4, 64)
    weight[0, 0] = torch.nan
    for name in ("itq3s", "higgs", "itq3s-ternary"):
        for search in ("pnorm", "minmax"):
            with pytest.raises(NumericalError, match="NaN or Inf"):
                Scheme.of(name).number_format.fit(weight, Scheme.of(name), search)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["higgs", "itq3s-ternary"])
def test_scales_that_overflow_are_refused(name: str) -> None:
    """ITQ3_S's multipliers keep its own scales a tenth as large."""
    weight, scheme = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 1e6, Scheme.of(name)
    for search in scheme.number_format.searches:
        with pytest.raises(NumericalError, match=r"overflows float16 \(.*, the largest is 65504\)"):
            scheme.number_format.fit(weight, scheme, search, torch.ones(300))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "hadamard-3"}, "kind of input rotation 'hadamard-3'"),
        (
            {"seed": 5},
            "does not match its tensors: it gives model.layers.0.self_attn.q_proj input_rotation=.*'seed': 5",
        ),
        ({"block": 64}, "does not match its tensors: .*'block': 64.*'block': 256"),
        ({"block": 100}, "must be one of 32, 64, 128, 256, 512, 1024; got 100"),
        ({"format": "itq3s-104"}, "q_proj format='itq3s-104', and ptq_report.json says .* with 'itq3s'"),
        ({"format": "itq3s-v2"}, "unknown number format 'itq3s-v2'"),
        ({"version": 99}, "has version 99, this ptq reads version 1"),
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_match_its_tensors_is_refused(
    change: dict[str, Any], said: str, stored: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(stored, folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    scheme = next(iter(quantization["schemes"].values()))
    target = {"version": quantization, "format": scheme}.get(next(iter(change)), scheme["input_rotation"])
    target.update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ptq.PtqError, match=said):
        ptq.load(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 5}, r"quantization_config was changed after it was written: its checksum is \w{16}, and check says"),
        ({"block": 64}, "was changed after it was written"),
        ({"kind": "hadamard-3"}, "kind of input rotation 'hadamard-3'"),
    ],
    ids=str,
)
def test_signs_are_checked_without_a_report(change: dict[str, Any], said: str, stored: Path, tmp_path: Path) -> None:
    """What `save_pretrained` writes: no report, and no tensor that shows another seed."""
    folder = tmp_path / "saved"
    ptq.load(stored).save_pretrained(folder)
    assert not (folder / "ptq_report.json").exists()
    assert torch.equal(logits(ptq.load(folder)), logits(ptq.load(stored)))
    config = json.loads((folder / "config.json").read_text())
    next(iter(config["quantization_config"]["schemes"].values()))["input_rotation"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ptq.PtqError, match=said):
        ptq.load(folder)
    if "seed" in change:
        assert not torch.equal(logits(ptq.load(folder, verify=False)), logits(ptq.load(stored)))
        del config["quantization_config"]["check"]
        (folder / "config.json").write_text(json.dumps(config))
        ptq.load(folder)


def test_signs_of_one_seed_for_all_inputs_are_read(tmp_path: Path) -> None:
    """As checkpoints had them before every input got its own: rotated inputs still meet the right weights."""
    model = tiny_model("llama")
    scheme = Scheme.of("itq3s", input_rotation=Rotation(5, 256))
    report = ptq.quantize(
        model, out=tmp_path / "out", device="cpu", method="rtn", format="itq3s", overrides=(("*", scheme),)
    )
    assert {layer.scheme["input_rotation"]["seed"] for layer in report.layers} == {5}
    loaded = ptq.load(tmp_path / "out")
    dense = tiny_model("llama")
    for name, module in loaded.named_modules():
        if isinstance(module, QuantLinear):
            weight = module(torch.eye(module.in_features)).T
            dense.get_submodule(name).weight.data = weight.detach()
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-3, atol=1e-4)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "model")
    tiny_model("llama").save_pretrained(folder)
    assert main(["quantize", "--method", "itq3s", folder, "-o", str(tmp_path / "out"), "--json"]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "itq3s" in capsys.readouterr().out
    assert main(["quantize", "--method", "itq3s", "--asym", folder, "-o", str(tmp_path / "no")]) != 0
    assert "no zero points" in capsys.readouterr().err
