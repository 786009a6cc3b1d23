"""Flags to a recipe, the call that follows, and what is shown of its report."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.main import main
from cli.quantize import command
from cli.shared.method_flags import METHOD_FLAGS
from cli.shared.recipe_flags import build_recipe, parse_override
from ptq.errors import UsageError
from ptq.methods import METHODS
from ptq.pipeline.events import Event
from ptq.recipe import COMPUTE_DTYPES, CONTAINER_NAMES, CalibrationSpec, Recipe
from ptq.report import Report
from ptq.scheme import SCALE_DTYPES, Scheme


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, small_report: Report) -> list[dict[str, Any]]:
    """`ptq.quantize` replaced by a recorder that tells of two blocks and returns `small_report`."""
    seen: list[dict[str, Any]] = []

    def quantize(model: str, recipe: Recipe, **rest: Any) -> Report:
        seen.append({"model": model, "recipe": recipe, **rest})
        listener = rest["on_event"]
        for event in (Event("blocks", total=2), Event("layer", name="a.b"), Event("block_done", done=1, total=2)):
            listener(event)
        return small_report

    monkeypatch.setattr("ptq.quantize", quantize, raising=False)
    return seen


def test_no_flags_change_nothing() -> None:
    assert build_recipe(Recipe(), {"bits": None, "options": (), "ignore": ()}) == Recipe()


def test_every_flag_reaches_its_field(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    flags = "--method coreq --bits 2 --group-size 32 --asym --scale-dtype bfloat16 --calib pydoc --calib-samples 7"
    flags += " --calib-seqlen 99 --seed 5 --beam 4 -O cd_passes=2 -O coefficient=fixed --ignore *.a --ignore *.b"
    flags += " --override *.c=4,g0,sym --dtype float32 --container native --device cpu --trust-remote-code"
    assert main(["quantize", "MODEL", "-o", str(tmp_path / "OUT"), *flags.split()]) == 0
    (call,) = calls
    scheme = Scheme(2, symmetric=False, group_size=32, scale_dtype="bfloat16")
    assert call["recipe"] == Recipe(
        method="coreq",
        options={"beam": 4, "cd_passes": 2, "coefficient": "fixed"},
        scheme=scheme,
        overrides=(("*.c", dataclasses.replace(scheme, bits=4, group_size=None, symmetric=True)),),
        ignore=("*.a", "*.b"),
        calibration=CalibrationSpec("pydoc", samples=7, seqlen=99, seed=5),
        compute_dtype="float32",
        container="native",
    )
    assert (call["model"], call["out"], call["device"]) == ("MODEL", tmp_path / "OUT", "cpu")
    assert call["trust_remote_code"] is True


def test_group_size_zero_is_per_channel() -> None:
    assert build_recipe(Recipe(), {"group_size": 0}).scheme.group_size is None


def test_run_time_flags_reach_their_fields(calls: list[dict[str, Any]]) -> None:
    flags = "--bits 4 --act-bits 4 --act-sym --kv-bits 8 --kv-sym --rotate down,residual --override *.c=3,a8"
    assert main(["quantize", "MODEL", *flags.split(), "--override", "*.d=8,a0"]) == 0
    scheme = Scheme(4, act_bits=4, act_symmetric=True)
    assert calls[0]["recipe"] == Recipe(
        scheme=scheme,
        overrides=(("*.c", dataclasses.replace(scheme, bits=3, act_bits=8)), ("*.d", Scheme(8))),
        kv_bits=8,
        kv_symmetric=True,
        rotate=("residual", "down"),
    )
    assert build_recipe(Recipe(), {"rotate": ("residual", "down")}).rotate == ("residual", "down")


def test_zero_and_none_undo_what_a_recipe_says() -> None:
    base = Recipe(
        scheme=Scheme(4, act_bits=4, act_symmetric=True), kv_bits=4, kv_symmetric=True, rotate=("residual", "down")
    )
    undone = build_recipe(base, {"act_bits": 0, "kv_bits": 0, "rotate": ("none",)})
    assert undone == Recipe(scheme=Scheme(4))
    base_format = Recipe(scheme=Scheme.of("fp8", act_format="fp8"))
    assert build_recipe(base_format, {"act_bits": 0}).scheme == Scheme.of("fp8")
    assert build_recipe(base_format, {"act_bits": 8}).scheme == Scheme.of("fp8", act_bits=8)
    assert build_recipe(base, {"act_format": "fp8"}).scheme == Scheme(4, act_format="fp8")
    assert build_recipe(base, {"act_bits": 8}).scheme == Scheme(4, act_bits=8, act_symmetric=True)
    assert build_recipe(base, {"kv_symmetric": False}).kv_symmetric is False


def test_flags_of_methods_that_learn(calls: list[dict[str, Any]]) -> None:
    flags = "--window-schedule fixed --epochs 3 --lora-rank 8 --intra off --lr-lora 3e-4 --lr-clip 0.5 --lr-scale 1e-3"
    flags += " --lr-offset 2 --grad-accum 2 --train-batch 4 --loss huber --init gptq -O lr_clip=0.25"
    assert main(["quantize", "MODEL", "--method", "sliderquant", *flags.split()]) == 0
    options = calls[0]["recipe"].options
    assert options == {
        "schedule": "fixed",
        "epochs": 3,
        "lora_rank": 8,
        "intra": "off",
        "lr_lora": 3e-4,
        "lr_clip": 0.25,
        "lr_scale": 1e-3,
        "lr_offset": 2.0,
        "grad_accum": 2,
        "batch": 4,
        "loss": "huber",
        "init": "gptq",
    }
    assert METHOD_FLAGS.keys() == {"beam", "iters", *options}
    with pytest.raises(UsageError, match=r"--beam sets the option 'beam', which method 'sliderquant' does not.*coreq"):
        build_recipe(Recipe(), {"method": "sliderquant", "beam": 2})


@pytest.mark.parametrize("option", ["schedule", "intra", "loss", "init"])
def test_flags_name_the_choices(option: str) -> None:
    flag = METHOD_FLAGS[option]
    choices = typing.get_type_hints(METHODS["sliderquant"].config)[option]
    names = typing.get_args(choices) or ("none", "rtn", "gptq", "coreq")
    assert all(name in flag.metavar + flag.help for name in names)


@pytest.mark.parametrize("option", METHOD_FLAGS)
def test_a_flag_for_another_method_names_both(option: str) -> None:
    with pytest.raises(UsageError, match=f"{METHOD_FLAGS[option].flag} sets the option '{option}', which method 'rtn'"):
        build_recipe(Recipe(method="rtn"), {option: 1})


def test_recipe_file_is_the_base_and_flags_win(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    base = Recipe(
        "coreq",
        {"beam": 8, "damping": 0.05},
        Scheme(4, group_size=16),
        overrides=(("*.x", Scheme(8)),),
        ignore=("*.k",),
        calibration=CalibrationSpec("self", 3, 4, 5),
    )
    (tmp_path / "recipe.yaml").write_text(base.to_yaml())
    flags = ["--recipe", str(tmp_path / "recipe.yaml"), "--bits", "3", "--beam", "2", "--override", "*.y=2"]
    assert main(["quantize", "MODEL", *flags]) == 0
    recipe = calls[0]["recipe"]
    assert recipe.scheme == Scheme(3, group_size=16)
    assert recipe.options == {"beam": 2, "damping": 0.05}
    assert [pattern for pattern, _ in recipe.overrides] == ["*.y", "*.x"]
    assert (recipe.ignore, recipe.calibration) == (base.ignore, base.calibration)


def test_another_method_drops_the_files_options_aloud(
    calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(Recipe("coreq", {"beam": 8}).to_yaml())
    assert main(["quantize", "MODEL", "--recipe", str(tmp_path / "recipe.yaml"), "--method", "rtn"]) == 0
    assert calls[0]["recipe"].options == {}
    assert "options of coreq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "coreqq"}, "Did you mean 'coreq'"),
        ({"method": "rtn", "beam": 4}, "'beam'"),
        ({"options": ("bem=4",)}, "Did you mean 'beam'"),
        ({"options": ("beam",)}, "--option needs KEY=VALUE, got 'beam'"),
        ({"options": ("beam=many",)}, "'many'"),
        ({"options": ("coefficient=cor",)}, "Did you mean 'corr'"),
        ({"bits": 9}, "from 2 to 8, got 9"),
        ({"group_size": -1}, "got -1"),
        ({"scale_dtype": "float64"}, "float64"),
        ({"container": "natve"}, "Did you mean 'native'"),
        ({"dtype": "float31"}, "Did you mean 'float32'"),
        ({"calib_samples": 0}, "got 0"),
        ({"calib_bos": "yes"}, "unknown choice for calibration bos 'yes'"),
        ({"calib_template": "alwys"}, "Did you mean 'always'"),
        ({"act_bits": 9}, "act_bits must be a whole number from 2 to 8"),
        ({"act_symmetric": True}, r"act_bits \(--act-bits\) is not set"),
        ({"kv_bits": 1}, "kv_bits must be a whole number from 2 to 8"),
        ({"rotate": ("residul",)}, "Did you mean 'residual'"),
        ({"rotate": ("residual,",)}, "unknown rotation ''"),
        ({"overrides": ("*.a=4,a9",)}, "act_bits must be a whole number"),
    ],
)
def test_what_does_not_fit_is_a_usage_error(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_recipe(Recipe(), flags)


@given(st.integers(2, 8), st.none() | st.integers(0, 512), st.none() | st.booleans())
def test_override_text_round_trips(bits: int, group: int | None, symmetric: bool | None) -> None:
    base = Scheme(3, symmetric=False, group_size=48)
    text = f"*.down=x={bits}"
    text += "" if group is None else f",g{group}"
    text += "" if symmetric is None else f",{'sym' if symmetric else 'asym'}"
    pattern, scheme = parse_override(text, base)
    assert pattern == "*.down=x"
    assert scheme.bits == bits
    assert scheme.group_size == (48 if group is None else group or None)
    assert scheme.symmetric is bool(symmetric)


@pytest.mark.parametrize("text", ["4", "=4", "*.a=", "*.a=four", "*.a=4,h3", "*.a=4;g3", "*.a=4,a"])
def test_an_override_of_another_form_is_shown_the_form(text: str) -> None:
    with pytest.raises(UsageError, match=r"PATTERN=bits\[,gN\]\[,asym\]\[,aN"):
        parse_override(text, Scheme())


def test_default_output_names_method_and_width(calls: list[dict[str, Any]]) -> None:
    assert main(["quantize", "models/x.Q4_1.gguf", "--bits", "4", "--asym", "--group-size", "32"]) == 0
    assert calls[0]["out"] == Path("x.Q4_1-coreq-int4-asym-g32")


def test_json_is_the_report_and_nothing_else_on_stdout(
    calls: list[dict[str, Any]], small_report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "MODEL", "-o", "OUT", "--json"]) == 0
    assert Report.from_dict(json.loads(capsys.readouterr().out)) == small_report


def test_summary_shows_bits_worst_layer_kept_tensors_and_warnings(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "MODEL", "-o", "OUT"]) == 0
    shown = capsys.readouterr()
    assert "block 1/2" in shown.err
    for text in (
        "3.250 in 3 quantized linears",
        "40.0 kB bfloat16 -> 15.0 kB",
        "1 min 02 s",
        "warning: one block is small",
    ):
        assert text in shown.out
    first, second = (shown.out.index(f"model.layers.{i}.self_attn.q_proj") for i in (1, 0))
    assert first < second, "the layer with the larger loss comes first"
    assert "66.7%" in shown.out, "share of the embedding in all weight bytes"
    assert shown.out.rstrip().endswith("written to OUT")


def test_summary_shows_what_happens_at_run_time(
    monkeypatch: pytest.MonkeyPatch, small_report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = Scheme(4, act_bits=4, input_rotation=0).record()
    recipe = {"method": "rtn", "scheme": scheme, "kv_bits": 8, "kv_symmetric": False, "rotate": ["residual", "down"]}
    layers = tuple(dataclasses.replace(layer, scheme=scheme) for layer in small_report.layers)
    report = dataclasses.replace(small_report, recipe=recipe, layers=layers)
    monkeypatch.setattr("ptq.quantize", lambda *args, **rest: report)
    assert main(["quantize", "MODEL", "-o", "OUT"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "method rtn, int4 sym g64 a4 rotated" in shown
    assert "keys and values 8 bits, asymmetric" in shown
    assert "rotated residual, down" in shown
    assert "q_proj int4 sym g64 a4 rotated" in shown


def test_help_states_the_defaults_and_choices_of_the_recipe() -> None:
    recipe = Recipe()
    texts = {option.name: f"{getattr(option, 'help', '')}" for option in command.params}
    defaults = {
        "method": recipe.method,
        "bits": recipe.scheme.bits,
        "group_size": recipe.scheme.group_size,
        "symmetric": "sym",
        "scale_dtype": recipe.scheme.scale_dtype,
        "calib": recipe.calibration.source,
        "calib_samples": recipe.calibration.samples,
        "calib_seqlen": recipe.calibration.tokens_per_sequence,
        "calib_bos": recipe.calibration.bos,
        "calib_template": recipe.calibration.template,
        "seed": recipe.calibration.seed,
        "container": recipe.container,
        "format": recipe.scheme.format,
    }
    for name, value in defaults.items():
        assert f"[default: {value}]" in texts[name]
    assert all(name in texts["container"] for name in CONTAINER_NAMES)
    assert all(name in texts["dtype"] for name in COMPUTE_DTYPES)
    assert all(name in texts["scale_dtype"] for name in SCALE_DTYPES)


def test_how_sequences_begin_is_part_of_the_recipe() -> None:
    recipe = build_recipe(Recipe(), {"calib_bos": "never", "calib_template": "never"})
    assert recipe.to_dict()["calibration"]["bos"] == "never"
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan", "a.yaml", "--plan", "b.yaml"], "--plan is given 2 times"),
        (["--plan", "a.yaml", "--target-bpw", "4"], "give one of them"),
    ],
)
def test_a_plan_stands_alone(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["quantize", "MODEL", "-o", str(tmp_path / "OUT"), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rotate", "residual,down"], "llama.cpp rotates no inputs. Give --rotate residual"),
        (["--rotate", "auto"], "llama.cpp rotates no inputs. Give --rotate residual"),
        (["--act-bits", "8"], "leave out --act-bits"),
        (["--kv-bits", "4"], "--kv-bits"),
        (["--container", "gptq"], "is a file"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused_before_the_run(
    flags: list[str], message: str, calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["quantize", "--method", "rtn", "--bits", "4", *flags, "some/model", "-o", str(tmp_path / "x.gguf")])
    assert code == UsageError.exit_code
    assert message in capsys.readouterr().err
    assert not calls


def test_a_gguf_file_needs_a_tokenizer_before_the_run(
    calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    assert main(["quantize", "--method", "rtn", str(tmp_path / "model"), "-o", str(tmp_path / "x.gguf")])
    assert "has no tokenizer.json, which a GGUF file needs" in capsys.readouterr().err
    assert not calls
