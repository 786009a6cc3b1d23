#!/usr/bin/env python3
"""What integer activations of the CUDA kernels cost: KL of next-token distributions against products of the activations
as they are (``PTQ_EXACT=1``).

    python benchmarks/quality/kernel_divergence.py OUT --text TEXT.txt --tokens 512 --json divergence.json

A text is read with a key-value cache in chunks of 1 token (16-bit inputs), 8 and 32 tokens (8-bit inputs), each once as
users run it and once exactly. The row ``order`` has no integer activations: it compares exact chunks of 1 with exact
chunks of 32, so that it is what another order of sums does in this dtype anyway. On a CPU everything is exact.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.model.cache import cache_argument, returned_cache
from cli.shared.models import load_model
from ptq.runtime.chosen import kernel_line

CHUNKS = {1: "16-bit inputs", 8: "8-bit inputs", 32: "8-bit inputs"}


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor, chunk: int, exact: bool) -> Tensor:
    """Of the next token after every token, float32 ``[tokens, vocab]`` on the CPU."""
    os.environ["PTQ_EXACT"] = "1" if exact else "0"
    cache, rows = None, []
    for part in ids.to(model.device).split(chunk):
        out = model(input_ids=part[None], use_cache=True, **cache_argument(model, cache))
        cache = returned_cache(out)
        rows.append(torch.log_softmax(out.logits[0].float(), -1).cpu())
    return torch.cat(rows)


def divergence(base: Tensor, other: Tensor) -> dict[str, float]:
    """KL(base || other) in nats, and how often the most probable token is another one."""
    kl = (base.exp() * (base - other)).sum(-1)
    moved = (base.argmax(-1) != other.argmax(-1)).float().mean()
    return {"kl_mean": kl.mean().item(), "kl_max": kl.max().item(), "other_top_token": moved.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    started = time.monotonic()
    loaded = load_model(options.model, device=options.device)
    text = options.text.read_text(encoding="utf-8")[: 16 * options.tokens]
    ids = torch.tensor(loaded.tokenizer(text).input_ids)[: options.tokens]
    log_probabilities(loaded.model, ids[:8], 8, exact=False)  # weights are repacked
    exact = {chunk: log_probabilities(loaded.model, ids, chunk, exact=True) for chunk in CHUNKS}
    rows = []
    for chunk, inputs in CHUNKS.items():
        found = divergence(exact[chunk], log_probabilities(loaded.model, ids, chunk, exact=False))
        rows.append({"chunk": chunk, "inputs": inputs, **found})
    rows.append({"chunk": "order", "inputs": "exact", **divergence(exact[1], exact[32])})
    result = {
        "model": options.model,
        "tokens": len(ids),
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype)[6:],
        "kernels": kernel_line(loaded.model),
        "rows": rows,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
