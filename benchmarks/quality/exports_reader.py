"""Logits of an exported model by another runtime, in an environment of its own that need not have ptq.

    python exports_reader.py READER TOKENS.npy MODEL LOGITS.npy [MODEL LOGITS.npy ...]

READER is transformers, gptqmodel or llama_cpp; MODEL a folder, for llama_cpp a .gguf file; TOKENS int64 ``[rows, n]``;
LOGITS float32 ``[rows, n, vocabulary]``. The last line on stdout is JSON: versions, and the class that computed each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

__all__ = ["READERS"]

Read = Callable[[str, Any], tuple[Any, str]]


def _forward(model: Any, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        rows = [model(torch.from_numpy(row[None])).logits[0].float().numpy() for row in tokens]
    return np.stack(rows)


def _kernel(model: Any) -> str:
    """The class of the last block's first linear that is quantized, or else of any."""
    names = [type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Linear")]
    packed = [name for name in names if name != "Linear"]
    return (packed or names)[-1]


def _transformers(path: str, tokens: Any) -> tuple[Any, str]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu", local_files_only=True).eval()
    return _forward(model, tokens), _kernel(model)


def _gptqmodel(path: str, tokens: Any) -> tuple[Any, str]:
    import gptqmodel
    import torch

    gptqmodel._default_cpu_workers = lambda: 2  # 7.6 asks two workers of a pool that has one on two cores
    with open(f"{path}/config.json", encoding="utf-8") as file:
        dtype = getattr(torch, json.load(file).get("dtype", "float16"))
    model = gptqmodel.GPTQModel.load(path, backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=dtype).model.eval()
    return _forward(model, tokens), _kernel(model)


def _llama_cpp(path: str, tokens: Any) -> tuple[Any, str]:
    import llama_cpp

    width = tokens.shape[1]
    model = llama_cpp.Llama(path, n_ctx=width, logits_all=True, verbose=False, n_threads=1, flash_attn=False)
    rows = []
    for row in tokens.tolist():
        model.reset()
        model.eval(row)
        rows.append(np.array(model.scores[:width], dtype=np.float32))
    return np.stack(rows), "llama.cpp"


READERS: dict[str, Read] = {"transformers": _transformers, "gptqmodel": _gptqmodel, "llama_cpp": _llama_cpp}
_PACKAGES = ("transformers", "compressed-tensors", "gptqmodel", "optimum", "llama-cpp-python", "torch")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "llama_cpp" in sys.modules:  # also where it is no installed package but a folder of its sources
        found["llama-cpp-python"] = str(sys.modules["llama_cpp"].__version__)
    return found


if __name__ == "__main__":
    reader, tokens_file, *pairs = sys.argv[1:]
    kernels = []
    for path, out in zip(pairs[::2], pairs[1::2], strict=True):
        logits, kernel = READERS[reader](path, np.load(tokens_file))
        np.save(out, logits)
        kernels.append(kernel)
    assert not any(name.split(".")[0] == "ptq" for name in sys.modules)
    print(json.dumps({"versions": _versions(), "kernels": kernels}))
