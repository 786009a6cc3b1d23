#!/usr/bin/env python3
"""Whether every way to generate with a packed model on a GPU gives the same tokens, and what it holds in memory.

    python benchmarks/speed/same_tokens.py OUT --new 64 --prompt "Once upon a time" --out same_tokens.jsonl

`graph` (what `ptq generate` runs) is compared with the same steps run eagerly, without merged products, with a growing
cache, and with `model.generate` (static cache, not compiled; compiled with ``--compiled``). With one kind of cache the
tokens must be equal; with another the order of sums in attention differs, and a near-tie may fall the other way. Then
the tensors that a saved model would have are compared with the checkpoint's files.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from calib.data.sampling import sample_steps
from calib.data.static_sampling import _cuda_graph, static_steps
from cli.shared.models import load_model
from ptq.runtime.chosen import kernel_line
from ptq.runtime.linear import QuantLinear

Step = Callable[[], object]
START = time.monotonic()


def refuse(step: Step, device: torch.device) -> Step:
    raise RuntimeError("not captured, to compare")


def immediately(step: Step, device: torch.device) -> Step:
    """Where there is no GPU: the program itself can be tried."""
    return step


def tokens(steps: Any) -> list[int]:
    return torch.stack(list(steps), 1)[0].tolist()


def generated(model: Any, prompt: Tensor, new: int, **options: Any) -> list[int]:
    found = model.generate(
        prompt.to(model.device),
        attention_mask=torch.ones_like(prompt).to(model.device),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return found[0, prompt.shape[1] :].tolist()


def same_until(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def memory(model: Any) -> dict[str, float]:
    if model.device.type != "cuda":
        return {}
    gc.collect()
    torch.cuda.empty_cache()
    return {"gb": round(torch.cuda.memory_allocated() / 1e9, 4)}


def stored(model: Any, folder: Path) -> dict[str, Any]:
    """Tensors of the files that differ from those of the model."""
    state, differing, compared = model.state_dict(), [], 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                if key in state:
                    compared += 1
                    if not torch.equal(handle.get_tensor(key), state[key].cpu()):
                        differing.append(key)
    return {"compared": compared, "differing": differing[:5], "ok": compared > 0 and not differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", default="Once upon a time, in a village by the sea, there lived a")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile, as transformers does by itself")
    parser.add_argument("--out", type=Path, default=Path("same_tokens.jsonl"))
    options = parser.parse_args()
    file = options.out.open("a")

    def line(row: str, **values: Any) -> None:
        text = json.dumps({"row": row, "at": round(time.monotonic() - START, 1), "model": options.model, **values})
        print(text, flush=True)
        file.write(text + "\n")
        file.flush()

    loaded = load_model(options.model, device=options.device)
    model, capture = loaded.model, _cuda_graph if loaded.model.device.type == "cuda" else immediately
    prompt = torch.tensor([loaded.tokenizer(options.prompt).input_ids])
    uniform = torch.zeros(1, options.new, dtype=torch.float64)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    line("loaded", kernels=kernel_line(model), **memory(model))
    said: list[str] = []

    def static(take: Callable[[Step, torch.device], Step]) -> list[int]:
        return tokens(static_steps(model, prompt, uniform, temperature=0, capture=take, on_fallback=said.append))

    first = static(capture)
    gone, merged = sum(bool(one._gone) for one in linears), sum(one.merged is not None for one in linears)
    line("held once", linears=len(linears), gone=gone, merged=merged, fallback=said, **memory(model))

    def separate() -> list[int]:
        for linear in linears:
            linear.merged, linear._groups = None, None
        return static(capture)

    ways: dict[str, Callable[[], list[int]]] = {
        "graph again": lambda: static(capture),
        "eager steps": lambda: static(refuse),
        "growing cache": lambda: tokens(sample_steps(model, prompt, uniform, temperature=0)),
        "generate": lambda: generated(model, prompt, options.new),
        "generate, static": lambda: generated(
            model, prompt, options.new, cache_implementation="static", disable_compile=True
        ),
        "separate products": separate,
    }
    if options.compiled:
        ways["generate, compiled"] = lambda: generated(model, prompt, options.new, cache_implementation="static")
        ways["generate, compiled, again"] = ways["generate, compiled"]
    with torch.no_grad():
        for name, way in ways.items():
            try:
                before = time.monotonic()
                same = same_until(first, way())
                seconds = round(time.monotonic() - before, 2)
                line("tokens", way=name, same=same, of=options.new, ok=same == options.new, seconds=seconds)
            except Exception as error:
                traceback.print_exc()
                line("tokens", way=name, ok=False, error=repr(error)[:400])
    line("stored", **stored(model, Path(options.model)))
    line("text", text=loaded.tokenizer.decode(first))


if __name__ == "__main__":
    main()
