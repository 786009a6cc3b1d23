"""Checkpoints with packed experts: our loading, saving again, and a transformers that has never heard of us."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from calib.checkpoint.reader import ModelSource, open_model
from calib.model.experts import expert_lists
from calib.model.structure import find_blocks, is_linear, linear_weight, set_linear_weight
from ptq.containers.compressed_tensors import COMPRESSED_TENSORS
from ptq.containers.native import NATIVE
from ptq.containers.select import select_container
from ptq.errors import OutputError, UsageError
from ptq.integration.transformers import register
from ptq.quantized import QuantizedWeight
from ptq.runtime.linear import QuantLinear
from ptq.scheme import SCALE_DTYPES, Scheme
from tests.support.integer_weights import integer_weight
from tests.support.tiny_models import EXPERT_FAMILIES, MIXTURES, tiny_model

FAMILIES = (*MIXTURES, *(family for family in EXPERT_FAMILIES if family != "llama4_text"))
FP16, BF16 = Scheme(4, group_size=16, scale_dtype="float16"), Scheme(4, group_size=16, scale_dtype="bfloat16")
TOKENS = torch.randint(2, 400, (2, 16), generator=torch.Generator().manual_seed(3))
ROUTERS = re.compile(r".*\.(gate|router|shared_expert_gate)")
KEPT: dict[str, str] = {
    "nothing": "(?!)",
    "one expert": r".*\.experts\.1\..*",
    "one linear": r".*\.experts\.2\.down_proj",
    "one layer": r".*layers\.1\..*\.experts\..*",
    "all gates": r".*\.experts\.\d+\.gate_proj",
    "all experts": r".*\.experts\..*",
}


def nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round to nearest, symmetric, largest weight of a group at the end of the grid."""
    size, half = scheme.group_size or weight.shape[1], 2 ** (scheme.bits - 1)
    scale = torch.stack([group.abs().amax(1) for group in weight.float().split(size, 1)], 1) / half
    scale = scale.clamp_min(1e-6).to(SCALE_DTYPES[scheme.scale_dtype])
    codes = (weight.float() / scale.float().repeat_interleave(size, 1)).round() + half
    return integer_weight(codes.clamp(0, 2 * half - 1).to(torch.uint8), scale, None, scheme)


def linears_of(source: ModelSource) -> dict[str, nn.Module]:
    return {name: module for name, module in source.skeleton.named_modules() if is_linear(module)}


def schemes_of(source: ModelSource, scheme: Scheme, kept: str = KEPT["nothing"]) -> dict[str, Scheme | None]:
    """A scheme for every linear in a block that is no router and not named by the pattern."""
    blocks = tuple(f"{name}." for name in find_blocks(source.skeleton))
    packed = {n for n in linears_of(source) if n.startswith(blocks) and not ROUTERS.fullmatch(n)}
    return {name: None if re.fullmatch(kept, name) else scheme for name in sorted(packed)}


def write(source: ModelSource, out: Path, schemes: dict[str, Scheme | None], module: Any) -> Tensor:
    """Write a checkpoint block by block; gives the logits of the split model with the dequantized weights."""
    names, linears = source.tensor_names(), linears_of(source)
    done = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    tensors: dict[str, Tensor] = {}
    for block in (*(f"{name}." for name in find_blocks(source.skeleton)), None):
        part = frozenset(n for n in names if n.startswith(block)) if block else names
        names -= part
        source.load(part)
        for name in done:
            if f"{name}.weight" in part:
                quantized = nearest(linear_weight(linears[name]), done[name])
                tensors |= module.layer_tensors(name, quantized)
                set_linear_weight(linears[name], quantized.dequantize(source.dtype))
        passing = part - {f"{name}.weight" for name in done}
        tensors |= {key: tensor for key, _, tensor in source.raw_tensors(passing)}
    out.mkdir()
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads(source.skeleton.config.to_json_string())
    config["architectures"] = [type(source.skeleton).__name__]
    config["quantization_config"] = module.quantization_config(schemes, linears)
    (out / "config.json").write_text(json.dumps(config))
    return logits(source.skeleton)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def load(folder: Path, auto: Any = AutoModelForCausalLM) -> Any:
    return auto.from_pretrained(folder, dtype="auto", experts_implementation="eager")


def packed(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.fixture(autouse=True)
def no_loading_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """transformers reports missing, unexpected or mismatched keys by its logger: no test here may cause one."""
    register()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == []


def round_trip(family: str, kept: str, kind: str, folder: Path) -> None:
    model = tiny_model(family, experts_implementation="eager")
    if kind == "folder":
        model.save_pretrained(folder / "model")
    source = open_model(folder / "model" if kind == "folder" else model)
    schemes = schemes_of(source, FP16, KEPT[kept])
    wanted = write(source, folder / "out", schemes, NATIVE)
    loaded = load(folder / "out")
    assert packed(loaded) == {name for name, scheme in schemes.items() if scheme is not None}
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-5, atol=1e-5)
    assert loaded.generate(TOKENS[:1, :4], max_new_tokens=2, do_sample=False, pad_token_id=1).shape == (1, 6)
    assert bool(expert_lists(loaded)) == (kept != "all experts")

    loaded.save_pretrained(folder / "again")
    again = load(folder / "again")
    before, after = loaded.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    written, saved = (stored_packed(folder / name, packed(loaded)) for name in ("out", "again"))
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[key], saved[key]) for key in written)


def stored_packed(folder: Path, linears: set[str]) -> dict[str, Tensor]:
    """What the file stores of packed linears, under whatever names it has for them."""
    stored = load_file(folder / "model.safetensors")
    dense = {key for key in stored if key.rpartition(".")[0] not in linears and not key.endswith(("packed", "scale"))}
    return {key: tensor for key, tensor in stored.items() if key not in dense}


@pytest.mark.parametrize("kind", ["folder", "memory"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_load_and_save(family: str, kind: str, tmp_path: Path) -> None:
    round_trip(family, "nothing", kind, tmp_path)


@pytest.mark.parametrize("kept", [kept for kept in KEPT if kept != "nothing"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_that_stay_dense_load_beside_packed_ones(family: str, kept: str, tmp_path: Path) -> None:
    round_trip(family, kept, "folder", tmp_path)


def test_the_inner_model_has_the_same_experts(tmp_path: Path) -> None:
    source = open_model(tiny_model("qwen3_moe", tie_word_embeddings=True))  # no head in the file that is too much
    write(source, tmp_path / "out", schemes_of(source, FP16, KEPT["one expert"]), NATIVE)
    whole, inner = load(tmp_path / "out"), load(tmp_path / "out", AutoModel)
    assert {f"model.{name}" for name in packed(inner)} == packed(whole)
    state = whole.state_dict()
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in inner.state_dict().items())


def test_a_config_with_an_expert_too_many_is_refused(tmp_path: Path) -> None:
    source = open_model(tiny_model("qwen3_moe"))
    write(source, tmp_path / "out", schemes_of(source, FP16), NATIVE)
    config = json.loads(
        (tmp_path / "out" / "config.json").read_text().replace("experts.3.up_proj", "experts.4.up_proj")
    )
    config["quantization_config"].pop("check")  # it would say so first
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OutputError, match=r"experts\.4\.up_proj is packed.*no such module"):
        load(tmp_path / "out")


# -- the compressed-tensors format -------------------------------------------------------------------------------------

Change = Callable[[dict[str, Scheme | None]], dict[str, Scheme | None]]
SELECTED: dict[str, tuple[str, torch.dtype, Change, str]] = {
    "qwen3_moe": ("qwen3_moe", torch.bfloat16, lambda s: s, "it carries every scheme"),
    "deepseek_v3": ("deepseek_v3", torch.bfloat16, lambda s: s, "it carries every scheme"),
    "other names": ("mixtral", torch.bfloat16, lambda s: s, r"experts\.0\.gate_proj is a name under which"),
    "other dtype": ("qwen3_moe", torch.float32, lambda s: s, "would get the dtype of its scales"),
    "dense expert": (
        "qwen3_moe",
        torch.bfloat16,
        lambda s: s | {"model.layers.1.mlp.experts.3.up_proj": None},
        r"experts\.3\.up_proj is in full precision",
    ),
    "two schemes": (
        "qwen3_moe",
        torch.bfloat16,
        lambda s: s | {"model.layers.0.self_attn.q_proj": Scheme(8, group_size=16, scale_dtype="bfloat16")},
        "one of 2 schemes",
    ),
    "fused": ("llama4_text", torch.bfloat16, lambda s: s, "holds experts in full precision"),
}


@pytest.mark.parametrize("case", SELECTED)
def test_the_format_that_stock_transformers_can_load(case: str) -> None:
    family, dtype, change, reason = SELECTED[case]
    source = open_model(tiny_model(family, dtype))
    schemes = change(schemes_of(source, FP16 if dtype == torch.float32 else BF16))
    linears = linears_of(source)
    name, why = select_container("auto", schemes, linears, source.skeleton)
    assert name == ("compressed-tensors" if "carries" in reason else "native")
    assert re.search(reason, why)
    if name == "native":
        with pytest.raises(UsageError, match=reason):
            select_container("compressed-tensors", schemes, linears, source.skeleton)


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.split(".")[0] == "ptq" for name in sys.modules)
answers, tokens = {}, torch.tensor(json.loads(sys.argv[1]))
for folder in json.loads(sys.argv[2]):
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", experts_implementation="eager", output_loading_info=True)
        torch.save(model(tokens, use_cache=False).logits, folder + "/logits.pt")
        answers[folder] = "missing" if info["missing_keys"] else "OK"
    except Exception as error:
        answers[folder] = type(error).__name__
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """What transformers makes of our folders in one process that never imports ptq (its start takes seconds)."""
    register()
    root = tmp_path_factory.mktemp("stock")
    for case in ("qwen3_moe", "deepseek_v3", "other names", "other dtype", "dense expert"):
        family, dtype, change, _ = SELECTED[case]
        source = open_model(tiny_model(family, dtype))
        schemes = change(schemes_of(source, FP16 if dtype == torch.float32 else BF16))
        write(source, root / case, schemes, COMPRESSED_TENSORS)
    load(root / "qwen3_moe").save_pretrained(root / "again")
    folders = [str(path) for path in root.iterdir()]
    arguments = [json.dumps(TOKENS.tolist()), json.dumps(folders)]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *arguments], capture_output=True, text=True, timeout=120, check=True, cwd=root
    )
    return root, {Path(folder).name: answer for folder, answer in json.loads(done.stdout).items()}


@pytest.mark.parametrize("case", ["qwen3_moe", "deepseek_v3", "again"])
def test_stock_transformers_gives_our_logits(case: str, stock: tuple[Path, dict[str, str]]) -> None:
    root, answers = stock
    assert answers[case] == "OK"
    ours = load(root / case)
    assert any(".experts." in name for name in packed(ours))
    assert torch.equal(torch.load(root / case / "logits.pt"), logits(ours))


@pytest.mark.parametrize(
    ("case", "answer"), [("other names", "missing"), ("other dtype", "RuntimeError"), ("dense expert", "RuntimeError")]
)
def test_what_is_refused_would_not_load(case: str, answer: str, stock: tuple[Path, dict[str, str]]) -> None:
    """The reasons of `select_container`; once transformers loads these, this test says so."""
    assert stock[1][case] == answer
    if case == "dense expert":
        assert any(".experts." in name for name in packed(load(stock[0] / case)))  # we can


def test_experts_of_others_under_their_own_names_are_decompressed(tmp_path: Path) -> None:
    """Mixtral as other tools write it: its experts stay fused, as in stock transformers, the rest stays packed."""
    source = open_model(tiny_model("mixtral", torch.bfloat16, experts_implementation="eager"))
    schemes = schemes_of(source, BF16)
    wanted = write(source, tmp_path / "out", schemes, COMPRESSED_TENSORS)
    file = tmp_path / "out" / "model.safetensors"
    theirs = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    def rename(key: str) -> str:
        key = re.sub(r"(experts\.\d+\.)(\w+)", lambda m: m[1] + theirs[m[2]], key)
        return key.replace(".mlp.", ".block_sparse_moe.")

    save_file({rename(key): value for key, value in load_file(file).items()}, file, {"format": "pt"})
    loaded = load(tmp_path / "out")
    assert expert_lists(loaded) == {}
    assert packed(loaded) == {name for name in schemes if ".experts." not in name}
    torch.testing.assert_close(logits(loaded), wanted, rtol=0.02, atol=0.02)
