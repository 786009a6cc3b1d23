"""Headers, indexes and configs of model folders: what is refused, with which sentence, before any memory is taken."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from calib.checkpoint.config import check_config, check_tokenizer_config
from calib.checkpoint.files import MAX_INDEX_BYTES, checkpoint_files, stored_tensors
from calib.checkpoint.json import MAX_DEPTH, parse_json, quoted, read_json
from calib.checkpoint.safetensors_header import BITS, MAX_HEADER_BYTES, check_headers, read_header
from calib.errors import ModelError, OutputError
from tests.support.tiny_models import tiny_model

GOLDEN = b'{"a":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[],"data_offsets":[4,5]}}'


def shard(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# -- headers -----------------------------------------------------------------------------------------------------------


def test_a_golden_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(shard(GOLDEN + b"  ", b"\0\0\0\0\7"))
    assert {name: tuple(stored) for name, stored in read_header(file).items()} == {
        "a": (file, "F16", (2, 1), 0, 4),
        "b": (file, "U8", (), 4, 5),
    }


@given(st.lists(st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 5), max_size=3)), max_size=5))
def test_headers_are_read_as_the_format_s_own_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, list[int]]]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for i, (dtype, shape) in enumerate(tensors):
        bits = math.prod(shape) * BITS[dtype]
        if bits % 8 == 0:
            header[f"t{i}"] = entry(dtype, shape, [end, end + bits // 8])
            end += bits // 8
    file = tmp_path_factory.mktemp("header") / "x.safetensors"
    file.write_bytes(shard(header, bytes(end)))
    found = read_header(file)
    with safe_open(file, framework="pt") as handle:
        assert set(handle.keys()) == found.keys()
        for name, stored in found.items():
            part = handle.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (stored.dtype, stored.shape)


BAD_HEADERS: list[tuple[bytes, str]] = [
    (b"", "0 bytes and claims a header of 0"),
    (b"\1\2\3", "3 bytes and claims"),
    (shard(GOLDEN, b"", length=2**63), "claims a header of 9223372036854775808"),
    (shard(GOLDEN, b"", length=len(GOLDEN) + 1), "claims a header"),
    (shard(GOLDEN, b"\0" * 4), "describes 5 bytes of data, the file has 4"),
    (shard(GOLDEN, b"\0" * 6), "describes 5 bytes of data, the file has 6"),
    (shard(b"\x80pickle"), "damaged"),
    (shard(b"\xff\xfe"), "damaged: 'utf-8'"),
    (shard(b"[1]"), "is a list and not an object"),
    (shard(b"[" * 5000 + b"]" * 5000), "nested deeper"),
    (shard(b'{"a":NaN}'), "NaN"),
    (shard(b'{"a":' + b"9" * 5000 + b"}"), "damaged"),
    (shard(b'{"a":{},"a":{}}'), "the key 'a' is there twice"),
    (shard({"__metadata__": {"format": 1}}), "__metadata__ is not an object of strings"),
    (shard({"__metadata__": []}), "__metadata__ is not"),
    (shard({"a": 3}), "entry of 'a' is not an object with dtype, shape and data_offsets"),
    (shard({"a": {"dtype": "U8", "shape": [4]}}, b"\0" * 4), "entry of 'a' is not an object"),
    (shard({"a": entry("O8")}, b"\0" * 4), "entry of 'a' has the unknown dtype 'O8'"),
    (shard({"a": entry(["U8"])}, b"\0" * 4), "unknown dtype"),
    (shard({"a": entry(shape=[-4])}, b"\0" * 4), r"shape '\[-4\]'"),
    (shard({"a": entry(shape=[True, 4])}, b"\0" * 4), r"shape '\[True, 4\]'"),
    (shard({"a": entry(shape=[1] * 65 + [4])}, b"\0" * 4), "not up to 64 sizes"),
    (shard({"a": entry(shape=4)}, b"\0" * 4), "shape '4'"),
    (shard({"a": entry(shape=[2**62, 2**62])}, b"\0" * 4), "at a range of 4"),
    (shard({"a": entry(shape=[3])}, b"\0" * 4), r"entry of 'a' is \[3\] of U8, 3 bytes, at a range of 4"),
    (shard({"a": entry(offsets=[4, 0])}, b"\0" * 4), "not \\[start, end\\]"),
    (shard({"a": entry(offsets=[0, 4, 4])}, b"\0" * 4), "not \\[start, end\\]"),
    (shard({"a": entry(offsets=[0.0, 4.0])}, b"\0" * 4), "not \\[start, end\\]"),
    (shard({"a": entry(offsets=[2, 6])}, b"\0" * 6), "'a' starts at byte 2, not 0: it leaves a gap"),
    (shard({"a": entry(), "b": entry(offsets=[2, 6])}, b"\0" * 6), "'b' starts at byte 2, not 4: it overlaps"),
    (shard({"a": entry(), "b": entry()}, b"\0" * 4), "overlaps"),
    (shard({"a": entry(offsets=[0, 2**40], shape=[2**40])}, b"\0" * 4), "describes 1099511627776 bytes"),
]


@pytest.mark.parametrize(("content", "message"), BAD_HEADERS)
def test_damaged_headers_are_refused_by_file_and_reason(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "etch" in str(caught.value), "the next step"


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as handle:  # sparse: no disk is used
        handle.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        handle.truncate(3 * MAX_HEADER_BYTES)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="exceeds the limit of 100000000"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_names_are_unique_across_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"the tensor 'w' is in a\.safetensors and in b\.safetensors"):
        check_headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


# -- folders and indexes -----------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards of one tensor each, an index and a config."""
    for name in ("a", "b"):
        save_file({f"{name}.weight": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write_index(folder: Path, metadata: Any = None, **weight_map: Any) -> None:
    names = {"a.weight": "a.safetensors", "b.weight": "b.safetensors"} | {
        name.replace("_", "."): file for name, file in weight_map.items()
    }
    index = {"metadata": {"total_size": 16} if metadata is None else metadata, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_sharded_folder_is_read(sharded: Path) -> None:
    assert {name: stored.file.name for name, stored in stored_tensors(sharded).items()} == {
        "a.weight": "a.safetensors",
        "b.weight": "b.safetensors",
    }


def test_the_hub_s_cache_of_links_is_fine(sharded: Path) -> None:
    (sharded / "blobs").mkdir()
    (sharded / "snapshot").mkdir()
    for i, path in enumerate([p for p in sharded.iterdir() if p.is_file()]):
        path.rename(sharded / "blobs" / str(i))
        (sharded / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / str(i))
    assert stored_tensors(sharded / "snapshot").keys() == {"a.weight", "b.weight"}


@pytest.mark.parametrize(
    "name",
    [
        *("../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "C:a.safetensors"),
        *("a.bin", "", ".", "a.safetensors\0", "\ud800.safetensors", "\n.safetensors", "x" * 300 + ".safetensors"),
        *(7, None, ["a.safetensors"], {"a.safetensors": 1}),
    ],
)
def test_a_shard_name_is_a_bare_name(name: object, sharded: Path) -> None:
    write_index(sharded, b_weight=name)
    with pytest.raises(ModelError, match="not a safetensors file in that folder"):
        checkpoint_files(sharded)


@pytest.mark.parametrize("metadata", [[], "x", {"total_size": -1}, {"total_size": "x"}, {"total_size": 1e30}])
def test_absurd_metadata_of_an_index_is_refused(metadata: object, sharded: Path) -> None:
    write_index(sharded, metadata)
    with pytest.raises(ModelError, match=r"index\.json is damaged: metadata"):
        stored_tensors(sharded)


def test_the_index_and_the_files_must_agree(sharded: Path) -> None:
    write_index(sharded, b_weight="a.safetensors")
    with pytest.raises(ModelError, match=r"names 1 tensors that its files do not hold \('b\.weight'\)"):
        stored_tensors(sharded)
    write_index(sharded, a_weight="b.safetensors", b_weight="a.safetensors")
    with pytest.raises(ModelError, match=r"'a\.weight' is in b\.safetensors, but it is in a\.safetensors"):
        stored_tensors(sharded)
    write_index(sharded, c_weight="c.safetensors")
    with pytest.raises(ModelError, match=r"lacks c\.safetensors, which its index names"):
        stored_tensors(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": NaN}'])
def test_an_index_without_a_map_is_refused(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        stored_tensors(sharded)


def test_a_key_of_the_index_is_there_once(sharded: Path) -> None:
    text = '{"weight_map": {"a.weight": "a.safetensors", "a.weight": "b.safetensors"}}'
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"'a\.weight' is there twice"):
        stored_tensors(sharded)


def test_an_index_beyond_its_limit_is_not_parsed(sharded: Path) -> None:
    with (sharded / "model.safetensors.index.json").open("r+b") as handle:
        handle.truncate(MAX_INDEX_BYTES + 1)
    with pytest.raises(ModelError, match=f"larger than {MAX_INDEX_BYTES} bytes"):
        stored_tensors(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pth", "x.pkl"])
def test_pickles_are_refused_with_the_way_to_convert(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=rf"pickle weights only \({name}\).*save_pretrained\(NEW\)"):
        checkpoint_files(tmp_path)


def test_an_adapter_is_not_a_model(sharded: Path) -> None:
    (sharded / "adapter_config.json").write_text('{"base_model_name_or_path": "some/repository"}')
    with pytest.raises(ModelError, match=r"adapter of 'some/repository'.*merge_and_unload.*remove adapter_config"):
        checkpoint_files(sharded)


@pytest.mark.parametrize("content", ['{"base_model_name_or_path": "some/repository"}', "{}", "[]", "no json"])
def test_an_adapter_alone_is_named_and_told_how_to_be_merged(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    (tmp_path / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match=r"holds an adapter.*merge_and_unload\(\)") as raised:
        checkpoint_files(tmp_path)
    assert ("some/repository" in str(raised.value)) == ("some" in content)
    assert "whole model" not in str(raised.value)


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_is_bounded_in_depth_and_size(tmp_path: Path) -> None:
    fine = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(fine, "x") is not None
    for levels in (MAX_DEPTH + 2, 100_000):
        with pytest.raises(ModelError, match="x is nested deeper than 32 levels"):
            parse_json(b"[" * levels + b"0" + b"]" * levels, "x")
    path = tmp_path / "x.json"
    path.write_bytes(b"[1,2]")
    assert read_json(path, 5) == [1, 2]
    with pytest.raises(OutputError, match="larger than 4 bytes"):
        read_json(path, 4, error=OutputError)
    with pytest.raises(ModelError, match="cannot read"):
        read_json(tmp_path / "absent.json", 4)


def test_infinity_is_for_configs_and_nan_for_nobody() -> None:
    assert parse_json(b'{"a": [0.0, Infinity], "a": -Infinity}', "x") == {"a": -math.inf}
    for text, strict in ((b"NaN", False), (b"Infinity", True), (b"-Infinity", True)):
        with pytest.raises(ModelError, match="no JSON number"):
            parse_json(text, "x", strict=strict)


@given(st.text())
def test_what_is_quoted_from_a_file_is_short_printable_ascii(text: str) -> None:
    shown = quoted(text)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= 802  # 80 characters, each at most ten when escaped


# -- configs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, name: str = "config.json", **fields: Any) -> None:
    path = folder / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | fields))


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the checkpoint has 20 tensors"),
    ({"head_dim": 2**40}, "head_dim is 1099511627776, but the checkpoint has 20 tensors, none wider than 400"),
    ({"num_experts": [4, 10**7]}, "num_experts is 10000000"),
    ({"text_config": {"vocab_size": 10**12}}, "vocab_size"),
    ({"max_position_embeddings": 10**12}, "the limit is 134217728 tokens"),
    ({"rope_theta": 2**60}, "beyond 2"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"dtype": "load"}, "dtype is 'load', not a floating-point dtype"),
    ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
    ({"text_config": {"dtype": "hub"}}, "dtype is 'hub'"),
    ({"text_config": 3}, "text_config is '3', not an object"),
    ({"quantization_config": "gptq"}, "quantization_config is 'gptq', not an object"),
    ({"attn_implementation": "kernels-community/flash-attn"}, "fetches no kernels"),
    ({"_attn_implementation": {"text_config": "x/y"}}, "fetches no kernels"),
    ({"experts_implementation": "a/b:c"}, "fetches no kernels"),
    ({"transformers_weights": "adapter_model.bin"}, "reads model.safetensors only"),
    ({"auto_map": "x.Y"}, "auto_map is 'x.Y', not an object"),
    ({"model_type": "x", "auto_map": {"AutoConfig": 3}}, "not the name of a class"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS)
def test_a_config_asks_for_no_more_than_the_checkpoint_has(fields: dict[str, Any], message: str, tiny: Path) -> None:
    stored = stored_tensors(tiny)
    assert check_config(tiny, stored=stored)["model_type"] == "llama"
    change(tiny, **fields)
    with pytest.raises(ModelError, match=message):
        check_config(tiny, stored=stored)


@pytest.mark.parametrize("text", ["[]", "3", "", "\x00", '{"a": NaN}', "[" * 9999])
def test_a_config_that_is_no_object_is_refused(text: str, tiny: Path) -> None:
    (tiny / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        check_config(tiny)


def test_code_runs_only_when_the_user_says_so(tiny: Path) -> None:
    code = {"AutoConfig": "configuration_new.NewConfig", "AutoModelForCausalLM": "modeling_new.NewModel"}
    change(tiny, auto_map=code)
    check_config(tiny)  # transformers has its own llama, and uses that
    change(tiny, model_type="new")
    with pytest.raises(ModelError, match=r"'configuration_new\.py', 'modeling_new\.py'.*--trust-remote-code"):
        check_config(tiny)
    check_config(tiny, trust_remote_code=True)
    change(tiny, auto_map={name: f"some/repository--{value}" for name, value in code.items()})
    with pytest.raises(ModelError, match="another repository"):
        check_config(tiny)
    with pytest.raises(ModelError, match="ptq fetches nothing that a config names"):
        check_config(tiny, trust_remote_code=True)


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["tokenization_new.New", None]}, ["tokenization_new.New", None]]
)
def test_the_code_of_a_tokenizer_too(auto_map: object, tiny: Path) -> None:
    check_tokenizer_config(tiny)
    change(tiny, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="PreTrainedTokenizerFast")
    check_tokenizer_config(tiny)  # transformers has that class, and uses it
    change(tiny, "tokenizer_config.json", tokenizer_class="New")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json needs Python code.*'tokenization_new\.py'.*--trust"):
        check_tokenizer_config(tiny)
    check_tokenizer_config(tiny, trust_remote_code=True)
    change(tiny, "tokenizer_config.json", tokenizer_class=3)
    with pytest.raises(ModelError, match="tokenizer_class is '3'"):
        check_tokenizer_config(tiny)


def test_saved_bytes_are_what_the_header_says() -> None:
    """The helper of this file writes what the library writes."""
    data = save({"a": torch.zeros(4, dtype=torch.uint8)})
    length = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + length]) == {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
