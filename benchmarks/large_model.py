#!/usr/bin/env python3
"""A checkpoint larger than memory, and what quantizing it takes.

    python benchmarks/large_model.py make FOLDER [--layers 42]        # 30 GB of 14B shapes; sparse, 3 GB on the disk
    python benchmarks/large_model.py rtn FOLDER OUT                   # the whole model through rtn
    python benchmarks/large_model.py coreq FOLDER OUT --blocks 2      # forecast, then the first blocks through coreq

`make` fills the embedding and the first two blocks with random numbers and leaves the rest of the files sparse (zeros
that take no room). Every run is a process of its own and prints one JSON object: seconds, peak resident size, and for
coreq what the forecast said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPES = {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
FILLED = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.", "model.norm.")


def make(folder: Path, layers: int) -> None:
    """A Qwen3 of 14B shapes, one shard a block."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3", num_hidden_layers=layers, **SHAPES)
    config.dtype, config.architectures = torch.bfloat16, ["Qwen3ForCausalLM"]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if name.startswith("model.layers.") else name.split(".")[-2]
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tuple(tensor.shape)
    rng = np.random.default_rng(0)
    for file, tensors in shards.items():
        write_shard(folder / file, tensors, rng)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(2 * int(np.prod(shape)) for tensors in shards.values() for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(json.dumps({"bytes": total, "files": len(shards)}))


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + offset)
        for name, shape in tensors.items():
            if name.startswith(FILLED):
                file.seek(start + header[name]["data_offsets"][0])
                fill(file, int(np.prod(shape)), rng, 1.0 if name.endswith("norm.weight") else 0.0)


def fill(file: Any, count: int, rng: np.random.Generator, mean: float) -> None:
    for begin in range(0, count, 1 << 24):
        values = rng.standard_normal(min(1 << 24, count - begin), dtype=np.float32) * 0.02 + mean
        file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def quantize(options: argparse.Namespace) -> None:
    import ptq
    from calib.text import Calibration
    from ptq.preflight import peak_memory

    tokens = torch.randint(0, SHAPES["vocab_size"], (options.samples, options.seqlen), generator=torch.Generator())
    calibration = None if options.command == "rtn" else Calibration(tokens, "random", 0, "none")
    arguments: dict[str, Any] = {
        "method": options.command,
        "bits": 3,
        "group_size": 64,
        "calibration": calibration,
        "offload": options.offload,
        "out": options.out,
    }
    record: dict[str, Any] = {"command": options.command, "tokens": list(tokens.shape), "offload": options.offload}
    if options.forecast:
        record["forecast"] = ptq.forecast(options.folder, **arguments).to_dict()
        record["forecast"].pop("kept")
    else:
        record["seconds"], record["blocks"] = run(ptq, options, arguments)
        record["peak_memory"] = peak_memory()
    record["versions"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(record))


def run(ptq: Any, options: argparse.Namespace, arguments: dict[str, Any]) -> tuple[float, list[float]]:
    """Seconds until the block asked for (or the end) is written, and after each block."""
    start, stamps = time.perf_counter(), []

    class Enough(Exception):
        pass

    def note(event: Any) -> None:
        if event.kind == "block_done":
            stamps.append(time.perf_counter() - start)
            print(f"block {event.done}/{event.total} after {stamps[-1]:.1f} s", file=sys.stderr)
            if options.blocks and event.done >= options.blocks:
                raise Enough

    with contextlib.suppress(Enough):
        ptq.quantize(options.folder, on_event=note, restart=True, **arguments)
    return time.perf_counter() - start, stamps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make")
    maker.add_argument("folder", type=Path)
    maker.add_argument("--layers", type=int, default=42)
    for name in ("rtn", "gptq", "coreq"):
        runner = commands.add_parser(name)
        runner.add_argument("folder")
        runner.add_argument("out")
        runner.add_argument("--blocks", type=int, default=0, help="stop after so many")
        runner.add_argument("--samples", type=int, default=8)
        runner.add_argument("--seqlen", type=int, default=512)
        runner.add_argument("--offload", default="auto")
        runner.add_argument("--forecast", action="store_true", help="only say what it would take")
    options = parser.parse_args()
    make(options.folder, options.layers) if options.command == "make" else quantize(options)


if __name__ == "__main__":
    main()
