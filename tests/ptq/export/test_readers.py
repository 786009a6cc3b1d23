"""Exports in the programs that they are for: the logits of each are those of our own runtime.

transformers with compressed-tensors is always there. GPTQModel and llama.cpp are not among our requirements: their
tests skip unless the package is installed here, or in an environment whose interpreter ``PTQ_READER_GPTQMODEL`` or
``PTQ_READER_LLAMA_CPP`` names. A reader is started once for all of its formats: starting takes most of the time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import ptq
from cli.shared.models import load_model
from ptq.export import export
from tests.support.stock import stock_transformers
from tests.support.tiny_models import tiny_model

READER = Path(__file__).parents[3] / "benchmarks" / "quality" / "exports_reader.py"
TOKENS = np.arange(5, 37).reshape(2, 16)


def interpreter(package: str) -> str:
    """A Python that has the reader, or the test skips."""
    named = os.environ.get(f"PTQ_READER_{package.upper()}")
    if named is None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed, and PTQ_READER_{package.upper()} names no interpreter that has it")
    return named or sys.executable


def compare(reader: str, models: Mapping[str, tuple[Path, Path]], folder: Path, share: float) -> None:
    """Hold the logits of a reader, a process that knows nothing of ptq, to those of our runtime.

    Args:
        reader: what reads.
        models: by case, the export and the result that it was made of.
        folder: for files between the processes.
        share: of the logits' spread, the largest difference.
    """
    np.save(folder / "tokens.npy", TOKENS)
    outs = {case: folder / f"{number}.npy" for number, case in enumerate(models)}
    pairs = [str(path) for case, (exported, _) in models.items() for path in (exported, outs[case])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.environ.get("PTQ_READER_PYTHONPATH", "")}
    command = [interpreter(reader), str(READER), reader, str(folder / "tokens.npy"), *pairs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout.splitlines()[-1])["kernels"]) == len(models)
    for case, (_, result) in models.items():
        found, wanted = torch.from_numpy(np.load(outs[case])), our_logits(result)
        assert float((found - wanted).abs().max()) < share * float(wanted.std()), case
        assert float((found.argmax(-1) == wanted.argmax(-1)).float().mean()) > 0.85, case


def our_logits(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_model(str(path)).model(torch.from_numpy(TOKENS)).logits
    return found.float()


def quantized(folder: Path, tokenizer: Any, model: Any = None, **fields: Any) -> Path:
    arguments: dict[str, Any] = {"method": "rtn", "device": "cpu", **fields}
    if "preset" not in fields:
        arguments = {"bits": 4, "group_size": 32, **arguments}
    model = tiny_model("llama", torch.bfloat16) if model is None else model
    ptq.quantize(model, out=folder, tokenizer=tokenizer, **arguments)
    return folder


# Weights alone: where inputs are rounded as well, one step of bfloat16 before it can be a step of FP8 after it
# (`ROUNDED`).
STOCK: dict[str, dict[str, Any]] = {
    "int4": {},
    "int3": {"bits": 3},
    "nvfp4": {"preset": "NVFP4A16"},
    "mxfp4": {"preset": "MXFP4A16"},
}


def test_compressed_tensors_and_dequantized_folders_in_transformers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    models = {}
    for number, (case, fields) in enumerate(STOCK.items()):
        out = quantized(tmp_path / str(number), tiny_tokenizer, container="native", **fields)
        export(out, format="compressed-tensors", out=tmp_path / f"{number} stock")
        models[case] = (tmp_path / f"{number} stock", out)
    export(tmp_path / "0", format="bf16", out=tmp_path / "bf16")
    models["bf16"] = (tmp_path / "bf16", tmp_path / "0")
    # In bfloat16, and packed weights are multiplied in another order than dequantized ones.
    compare("transformers", models, tmp_path, 0.1)


ROUNDED: dict[str, tuple[torch.dtype, float]] = {
    # In the dtype that stock transformers can load: it unpacks FP4 and the MX formats to bfloat16.
    "FP8_DYNAMIC": (torch.float32, 0.0),
    "W8A8": (torch.float32, 0.0),
    "MXFP4": (torch.bfloat16, 0.0),
    "MXFP8": (torch.bfloat16, 0.0),
    "NVFP4": (torch.bfloat16, 0.2),  # the library computes the scales of inputs in bfloat16, ours are in float32
}


@pytest.mark.parametrize("preset", ROUNDED)
def test_rounded_inputs_in_stock_transformers(preset: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The stock quantizer rounds inputs as well; the logits are ours, most of them bit by bit."""
    data = {"calib": "pydoc", "calib_samples": 2, "calib_seqlen": 32} if preset == "NVFP4" else {}
    quantized(tmp_path / "out", tiny_tokenizer, container="native", preset=preset, **data)
    export(tmp_path / "out", format="compressed-tensors", out=tmp_path / "stock")
    dtype, share = ROUNDED[preset]
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        wanted = ptq.load(tmp_path / "stock", dtype=dtype)(tokens).logits.float()
        with stock_transformers():
            found = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=dtype)(tokens).logits.float()
    assert float((found - wanted).abs().mean()) <= share * float(wanted.std())


INTEGERS: dict[str, dict[str, Any]] = {
    "gptq 4": {"container": "gptq"},
    "gptq 8": {"container": "gptq", "bits": 8},
    "gptq 3 asym": {"container": "gptq", "bits": 3, "symmetric": False},
    "awq": {"container": "awq"},
    "awq asym": {"container": "awq", "symmetric": False},
}


def test_gptq_and_awq_in_gptqmodel(tmp_path: Path, tiny_tokenizer: Any) -> None:
    interpreter("gptqmodel")
    outs = {case: quantized(tmp_path / case, tiny_tokenizer, **fields) for case, fields in INTEGERS.items()}
    compare("gptqmodel", {case: (out, out) for case, out in outs.items()}, tmp_path, 0.1)


TYPES: dict[str, dict[str, Any]] = {"Q4_0": {"bits": 4}, "Q5_0": {"bits": 5}, "Q8_0": {"bits": 8}}


def test_gguf_in_llama_cpp(tmp_path: Path, tiny_tokenizer: Any) -> None:
    interpreter("llama_cpp")
    models = {}
    for case, fields in TYPES.items():
        out = quantized(tmp_path / case, tiny_tokenizer, container="native", scale_dtype="float16", **fields)
        export(out, format="gguf", out=tmp_path / f"{case}.gguf", embedding="keep")
        models[case] = (tmp_path / f"{case}.gguf", out)
    compare("llama_cpp", models, tmp_path, 0.25)  # llama.cpp rounds the inputs of these types to 8 bits


# All experts for every token: llama.cpp rounds inputs to 8 bits, and where two are near a tie, chooses the other.
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64},
    "qwen3_moe": {"norm_topk_prob": True, "moe_intermediate_size": 64},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
}


def test_experts_and_nvfp4_in_llama_cpp(tmp_path: Path, tiny_tokenizer: Any) -> None:
    interpreter("llama_cpp")
    cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        family: (family, changes, {"scale_dtype": "float16"}) for family, changes in EXPERTS.items()
    }
    cases |= {
        f"{family} nvfp4": (family, {"intermediate_size": 64, **EXPERTS.get(family, {})}, {"preset": "NVFP4A16"})
        for family in ("llama", "qwen3", "mixtral", "qwen3_moe")
    }
    models = {}
    for number, (case, (family, changes, fields)) in enumerate(cases.items()):
        every = {"num_experts_per_tok": 4} if family in EXPERTS else {}
        model = tiny_model(family, torch.bfloat16, **changes, **every)
        out = quantized(tmp_path / str(number), tiny_tokenizer, model, container="native", **fields)
        export(out, format="gguf", out=tmp_path / f"{number}.gguf", embedding="keep")
        models[case] = (tmp_path / f"{number}.gguf", out)
    compare("llama_cpp", models, tmp_path, 0.25)
