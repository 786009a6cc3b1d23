"""Tensor layout, both formats' configs, and the writer's folder."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptq.checkpoint import writer
from ptq.checkpoint.writer import LOCK, CheckpointWriter, check_output_folder
from ptq.containers import native
from ptq.containers.compressed_tensors import COMPRESSED_TENSORS
from ptq.containers.native import NATIVE
from ptq.containers.select import select_container
from ptq.errors import OutputError, UsageError
from ptq.quantized import QuantizedWeight
from ptq.report import REPORT_NAME, Report
from ptq.scheme import SCALE_DTYPES, KeyValueScheme, Scheme
from tests.support.integer_weights import integer_weight
from tests.support.reports import empty_report
from tests.support.tiny_models import tiny_model

SYM, ASYM = (
    Scheme(bits=3, group_size=32, scale_dtype="float16"),
    Scheme(bits=3, symmetric=False, group_size=32, scale_dtype="float16"),
)
CONFIG = {"model_type": "llama", "dtype": "float32", "quantization_config": {"quant_method": "old"}}
REPORT = empty_report("native")


def random_weight(scheme: Scheme, out: int = 40, width: int = 96) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(1)
    top, groups = 2**scheme.bits, scheme.groups(width)
    codes = torch.randint(0, top, (out, width), generator=generator, dtype=torch.uint8)
    scale = torch.rand(out, groups, generator=generator).add(0.1).to(SCALE_DTYPES[scheme.scale_dtype])
    zero = torch.randint(0, top, (out, groups), generator=generator, dtype=torch.uint8)
    return integer_weight(codes, scale, None if scheme.symmetric else zero, scheme)


@pytest.mark.parametrize(
    "scheme", [SYM, ASYM, Scheme(7, False, 20, "bfloat16"), Scheme(2, True, None, scale_dtype="float16")]
)
def test_layout_round_trip(scheme: Scheme) -> None:
    weight = random_weight(scheme)
    tensors = weight.tensors("a.b")
    assert len(tensors) == (3 if scheme.symmetric else 4)
    back = NATIVE.read_layer("a.b", tensors, scheme, weight.shape)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_layout_golden() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8) % 8
    zero = torch.tensor([[5], [2]], dtype=torch.uint8)
    weight = integer_weight(
        codes, torch.tensor([[0.5], [2.0]]).half(), zero, Scheme(3, False, 8, scale_dtype="float16")
    )
    tensors = weight.tensors("x")
    # 0,1,...,7 in 3 bits each: 0o76543210; zero points 5 and 2 along the output channels: 0o25.
    assert tensors["x.weight_packed"].tolist() == [[0o76543210], [0o76543210]]
    assert tensors["x.weight_zero_point"].tolist() == [[0o25]]
    assert tensors["x.weight_shape"].tolist() == [2, 8]
    assert weight.dequantize()[:, 7].tolist() == [1.0, 10.0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_compressed_tensors_reads_the_same_values(bits: int, symmetric: bool, group_size: int | None) -> None:
    scheme = Scheme(bits, symmetric, group_size, "float16")
    weight = random_weight(scheme)
    config = COMPRESSED_TENSORS.quantization_config({"x": scheme}, {"x": nn.Linear(96, 40)})
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = {key.removeprefix("x."): value for key, value in weight.tensors("x").items()}
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(tensors, group)["weight"]
    assert torch.equal(theirs, weight.dequantize(torch.float16))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x.weight_shape": None}, "x.weight_shape is missing"),
        ({"x.weight_packed": torch.zeros(40, 8, dtype=torch.int32)}, r"needs torch.int32 \[40, 9\]"),
        ({"x.weight_scale": torch.zeros(40, 3)}, "x.weight_scale is torch.float32"),
        ({"x.weight_zero_point": None}, "x.weight_zero_point is missing"),
    ],
)
def test_damaged_tensors_are_named(change: dict[str, torch.Tensor | None], match: str) -> None:
    tensors = random_weight(ASYM).tensors("x") | change
    with pytest.raises(OutputError, match=match):
        NATIVE.read_layer("x", {k: v for k, v in tensors.items() if v is not None}, ASYM, (40, 96))


def test_weights_that_do_not_fit_their_scheme_are_not_written() -> None:
    weight = random_weight(SYM)
    with pytest.raises(ValueError, match="without zero points"):
        dataclasses.replace(weight, scheme=ASYM).tensors("x")
    with pytest.raises(ValueError, match=r"x\.weight_scale is torch\.float32"):
        dataclasses.replace(weight, params={"scale": weight.params["scale"].float()}).tensors("x")


LINEAR, HEAD = nn.Linear(96, 40), nn.Linear(40, 100)
REFUSED: dict[str, tuple[Scheme, nn.Module, str]] = {
    "asymmetric": (ASYM, LINEAR, "a has zero points of 3 bits"),
    "ragged": (
        Scheme(3, True, 64, scale_dtype="float16"),
        LINEAR,
        "96 input channels, not a multiple of the group size 64",
    ),
    "Conv1D": (SYM, Conv1D(40, 96), "a is a Conv1D"),  # type: ignore[no-untyped-call]
    "scales": (SYM, nn.Linear(96, 40, dtype=torch.bfloat16), "float16 scales.*the model's bfloat16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_compressed_tensors_cannot_carry(case: str) -> None:
    scheme, linear, reason = REFUSED[case]
    linears = {"a": linear, "head": HEAD}
    name, why = select_container("auto", {"a": scheme, "head": None}, linears, nn.Module())
    assert name == "native"
    with pytest.raises(UsageError, match=reason):
        select_container("compressed-tensors", {"a": scheme}, linears, nn.Module())
    assert why == COMPRESSED_TENSORS.unsupported_reason({"a": scheme}, linears, nn.Module(), None)


def test_what_compressed_tensors_can_carry() -> None:
    bf16 = dataclasses.replace(SYM, scale_dtype="bfloat16")
    linears = {"a": LINEAR, "b": nn.Linear(96, 40, dtype=torch.bfloat16, device="meta")}
    assert COMPRESSED_TENSORS.unsupported_reason({"a": SYM, "b": bf16}, linears, nn.Module(), None) is None
    assert select_container("auto", {"a": SYM}, linears, nn.Module())[0] == "compressed-tensors"
    assert select_container("native", {"a": SYM}, linears, nn.Module())[0] == "native"


def test_compressed_tensors_config_is_plain_json() -> None:
    config = COMPRESSED_TENSORS.quantization_config(
        {"a": SYM, "head": None}, {"a": LINEAR, "head": HEAD, "other": HEAD}
    )
    assert json.loads(json.dumps(config)) == config
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["head", "other"]
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert {key: group["weights"][key] for key in ("num_bits", "type", "symmetric", "strategy", "group_size")} == {
        "num_bits": 3,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
    }


def test_native_config_round_trip() -> None:
    schemes = {"a": SYM, "b": ASYM, "c": SYM, "head": None}
    config = NATIVE.quantization_config(schemes, {})
    assert len(config["schemes"]) == 2
    assert native.read_schemes(json.loads(json.dumps(config))) == {"a": SYM, "b": ASYM, "c": SYM}


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"act_bits": 4}, "the input of a is rounded to 4 bits"), ({"input_rotation": 0}, "the input of a is rotated")],
)
def test_what_happens_at_run_time_needs_the_native_format(change: dict[str, int], reason: str) -> None:
    schemes = {"a": dataclasses.replace(SYM, **change)}
    assert select_container("native", schemes, {"a": LINEAR}, nn.Module())[0] == "native"
    name, why = select_container("auto", schemes, {"a": LINEAR}, nn.Module())
    assert name == "native"
    assert reason in why
    with pytest.raises(UsageError, match=f"cannot carry this: {reason}"):
        select_container("compressed-tensors", schemes, {"a": LINEAR}, nn.Module())
    with pytest.raises(UsageError, match="keys and values are rounded to 4 bits"):
        select_container("compressed-tensors", {"a": SYM}, {"a": LINEAR}, nn.Module(), key_values=KeyValueScheme(4))
    assert select_container("auto", {"a": SYM}, {"a": LINEAR}, nn.Module(), key_values=KeyValueScheme(4))[0] == "native"


def test_the_config_names_every_field_of_a_scheme() -> None:
    config = NATIVE.quantization_config({"a": ASYM}, {})
    assert config.pop("check") == native.config_checksum(config)
    assert config == {
        "quant_method": "ptq",
        "version": 1,
        "schemes": {
            "int3-asym-g32-float16": {
                "format": "int",
                "bits": 3,
                "symmetric": False,
                "group_size": 32,
                "scale_dtype": "float16",
                "act_bits": None,
                "act_symmetric": False,
                "input_rotation": None,
                "act_format": None,
            }
        },
        "layers": {"a": "int3-asym-g32-float16"},
    }


def test_schemes_that_differ_in_what_happens_at_run_time_are_kept_apart() -> None:
    schemes: dict[str, Scheme | None] = {
        "a": dataclasses.replace(SYM, act_bits=4),
        "b": dataclasses.replace(SYM, act_bits=4, act_symmetric=True, input_rotation=7),
        "c": dataclasses.replace(SYM, act_bits=4, act_symmetric=True, input_rotation=8),
        "d": SYM,
        "e": Scheme.of("fp4"),
    }
    config = NATIVE.quantization_config(schemes, {})
    assert len(config["schemes"]) == 5
    assert "key_values" not in config
    assert native.read_schemes(json.loads(json.dumps(config))) == schemes
    assert native.read_key_values(config) is None


def test_key_values_stand_beside_the_schemes() -> None:
    config = NATIVE.quantization_config({"a": SYM}, {}, key_values=KeyValueScheme(4))
    assert config["key_values"] == {"bits": 4, "symmetric": False}
    assert native.read_key_values(json.loads(json.dumps(config))) == KeyValueScheme(4)
    assert native.read_schemes(config) == {"a": SYM}


@pytest.mark.parametrize("version", [None, 0, 2, True, "1"])
def test_other_versions_are_refused(version: object) -> None:
    config = NATIVE.quantization_config({"a": SYM}, {}) | {"version": version}
    for read in (native.read_schemes, native.read_key_values):
        with pytest.raises(OutputError, match=r"this ptq reads version 1: upgrade"):
            read(config)


def test_an_unsettled_scale_dtype_is_not_recorded() -> None:
    with pytest.raises(ValueError, match=r"a: .*Scheme\.resolved"):
        NATIVE.quantization_config({"a": Scheme(bits=3)}, {})
    bf16 = nn.Linear(128, 8, dtype=torch.bfloat16)
    assert COMPRESSED_TENSORS.unsupported_reason({"a": Scheme(bits=3)}, {"a": bf16}, nn.Module(), None) is None


def test_native_stores_a_weight_that_no_linear_takes() -> None:
    tombstone = NATIVE.layer_tensors("a", random_weight(SYM))["a.weight"]
    assert (tombstone.dtype, tuple(tombstone.shape)) == (torch.int8, (0,))


def write(out: Path, shards: int, method: str = "ptq", value: float = 1.0) -> CheckpointWriter:
    checkpoint = CheckpointWriter(out)
    for i in range(shards):
        checkpoint.write_part(str(i), {f"t{i}": torch.full((4,), value), f"s{i}.weight_scale": torch.zeros(100).half()})
    (checkpoint.companions / "tokenizer.json").write_text("{}")
    (checkpoint.companions / "templates").mkdir()
    (checkpoint.companions / "templates" / "tool.jinja").touch()
    checkpoint.finish(CONFIG, {"quant_method": method}, REPORT)
    return checkpoint


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_writer_makes_a_sharded_folder(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "out", 2)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    rest = {"model.safetensors.index.json", "config.json", REPORT_NAME, "tokenizer.json", "templates"}
    assert names(tmp_path / "out") == rest | set(shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["t1"] == shards[1]
    assert index["metadata"]["total_size"] == 2 * (16 + 200)
    with safe_open(tmp_path / "out" / shards[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert checkpoint.weight_bytes == sum((tmp_path / "out" / name).stat().st_size for name in shards)
    assert Report.load(tmp_path / "out") == REPORT


def test_writer_config(tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "ptq"}
    assert config["transformers_weights"] == native.GUARD_SENTENCE
    assert "model.safetensors" in names(tmp_path / "a")
    write(tmp_path / "b", 1, "compressed-tensors")
    assert "transformers_weights" not in json.loads((tmp_path / "b" / "config.json").read_text())


def test_writer_fills_in_a_missing_dtype_but_not_from_scales(tmp_path: Path) -> None:
    checkpoint = CheckpointWriter(tmp_path)
    checkpoint.write_part("a", {"a.weight_scale": torch.zeros(100).half(), "b": torch.zeros(4).bfloat16()})
    checkpoint.finish({"dtype": None}, {"quant_method": "ptq"}, REPORT)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_writer_files_have_the_users_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write(tmp_path / "out", 1)
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_an_interrupted_run_leaves_the_old_result_whole(tmp_path: Path) -> None:
    write(tmp_path, 3, value=1.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    unfinished = CheckpointWriter(tmp_path)
    unfinished.write_part("a", {"t0": torch.full((4,), 2.0)})
    now = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {name: data for name, data in now.items() if name != LOCK} == before
    with pytest.raises(OutputError, match="another run is writing"):
        CheckpointWriter(tmp_path)
    del unfinished  # its process ends, and its lock with it
    write(tmp_path, 1, value=3.0)
    assert names(tmp_path) == {"model.safetensors", "config.json", REPORT_NAME, "tokenizer.json", "templates"}
    assert load_file(tmp_path / "model.safetensors")["t0"].tolist() == [3.0] * 4


def test_a_crash_while_moving_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 2, value=1.0)
    checkpoint = CheckpointWriter(tmp_path)
    checkpoint.write_part("a", {"t0": torch.full((4,), 2.0)})
    real, moved = os.replace, list[Path]()

    def fail_on_report(source: Path, target: Path) -> None:
        moved.append(Path(target))
        if Path(target) == tmp_path / REPORT_NAME:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail_on_report)
    with pytest.raises(OutputError, match="No space left on device"):
        checkpoint.finish(CONFIG, {"quant_method": "ptq"}, REPORT)
    assert tmp_path / "model.safetensors" in moved
    assert not (tmp_path / "config.json").exists()
    check_output_folder(tmp_path)


def test_disk_full_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = CheckpointWriter(tmp_path)
    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(OutputError, match=r"shard-00000\.safetensors: No space left on device"):
        checkpoint.write_part("a", {"a": torch.zeros(1)})


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    checkpoint = CheckpointWriter(tmp_path)
    checkpoint.write_part("a", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"^a was written before"):
        checkpoint.write_part("b", {"a": torch.zeros(1)})


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    check_output_folder(tmp_path)
    check_output_folder(tmp_path / "new")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is not empty and was not written by ptq"):
        CheckpointWriter(tmp_path)
    assert names(tmp_path) == {"thesis.tex"}
    with pytest.raises(OutputError, match="is a file"):
        check_output_folder(tmp_path / "thesis.tex")


def test_tensors_outside_the_blocks_are_no_experts() -> None:
    """A vision tower's class token has three dimensions; only those of decoder blocks are experts."""
    model = tiny_model("llama")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    schemes = dict.fromkeys((name for name in linears if "layers" in name), SYM)
    model.tower = nn.Module()
    model.tower.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, 64)))
    assert select_container("auto", schemes, linears, model)[0] == "compressed-tensors"
    model.model.layers[0].register_parameter("experts", nn.Parameter(torch.zeros(2, 4, 4)))
    assert select_container("auto", schemes, linears, model)[0] == "native"
