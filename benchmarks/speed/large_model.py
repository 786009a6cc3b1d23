#!/usr/bin/env python3
"""Random checkpoints of large shapes, and what quantizing them takes.

    python benchmarks/speed/large_model.py make FOLDER  # 42 blocks of 14B shapes, 30.9 GB, sparse
    python benchmarks/speed/large_model.py rtn FOLDER OUT                      # the whole model through rtn
    python benchmarks/speed/large_model.py coreq FOLDER OUT --forecast         # what the forecast says
    python benchmarks/speed/large_model.py coreq FOLDER OUT --blocks 2         # and the first two blocks
    python benchmarks/speed/large_model.py make FOLDER --shapes 8b --layers 4 --filled 4  # for a GPU: seconds a block
    python benchmarks/speed/large_model.py coreq FOLDER OUT --samples 128 --seqlen 2048
    # a window of four blocks learns
    python benchmarks/speed/large_model.py sliderquant FOLDER OUT --samples 16 --seqlen 2048

`make` fills the embedding and the first blocks with random numbers and leaves the rest of the files sparse (zeros that
take no room). Every run prints one JSON object: seconds until each block was written, and peak memory.
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

COMMON = {"max_position_embeddings": 4096, "tie_word_embeddings": False, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "14b": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_attention_heads": 40,
        "vocab_size": 151936,
    },
    "8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "vocab_size": 128256,
    },
    "1b": {  # 63 million weights a block
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "vocab_size": 8192,
    },
}


def make(folder: Path, shapes: str, layers: int, filled: int) -> None:
    """One shard a block."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[shapes], **COMMON, num_hidden_layers=layers)
    config.dtype = torch.bfloat16
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    full = ("model.embed_tokens.", "model.norm.", *(f"model.layers.{i}." for i in range(filled)))
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if name.startswith("model.layers.") else name.split(".")[-2]
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tuple(tensor.shape)
    rng = np.random.default_rng(0)
    for file, tensors in shards.items():
        write_shard(folder / file, tensors, full, rng)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(2 * int(np.prod(shape)) for tensors in shards.values() for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(json.dumps({"bytes": total, "files": len(shards)}))


def write_shard(
    path: Path, tensors: dict[str, tuple[int, ...]], full: tuple[str, ...], rng: np.random.Generator
) -> None:
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
            if name.startswith(full):
                file.seek(start + header[name]["data_offsets"][0])
                fill(file, int(np.prod(shape)), rng, 1.0 if name.endswith("norm.weight") else 0.0)


def fill(file: Any, count: int, rng: np.random.Generator, mean: float) -> None:
    for begin in range(0, count, 1 << 24):
        values = rng.standard_normal(min(1 << 24, count - begin), dtype=np.float32) * 0.02 + mean
        file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def quantize(options: argparse.Namespace) -> None:
    import ptq
    from calib.data.tokens import Calibration
    from ptq.pipeline.preparation.preflight import peak_memory

    vocabulary = json.loads((Path(options.folder) / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (options.samples, options.seqlen), generator=generator)
    calibration = None if options.command == "rtn" else Calibration(tokens, "random", 0, "none")
    arguments: dict[str, Any] = {
        "method": options.command,
        "bits": 3,
        "group_size": 64,
        "calibration": calibration,
        "offload": options.offload,
        "out": options.out,
    }
    if options.command == "sliderquant":
        arguments |= {"schedule": "fixed", "size": 4, "iters": 12}  # one window of four blocks, a few steps
    record: dict[str, Any] = {"command": options.command, "tokens": list(tokens.shape), "offload": options.offload}
    if options.forecast:
        record["forecast"] = ptq.forecast(options.folder, **arguments).to_dict()
        record["forecast"].pop("kept")
    else:
        record |= run(ptq, options, arguments) | {"peak_memory": peak_memory()}
        if torch.cuda.is_available():
            record["peak_device"] = torch.cuda.max_memory_allocated()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    record["machine"] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device}
    print(json.dumps(record))


def run(ptq: Any, options: argparse.Namespace, arguments: dict[str, Any]) -> dict[str, Any]:
    """Seconds until the last block asked for (or everything) is written, after each block, and by part of the work."""
    start, stamps, found = time.perf_counter(), [], {}

    class Enough(Exception):
        pass

    def note(event: Any) -> None:
        if event.kind == "block_done":
            stamps.append(time.perf_counter() - start)
            print(f"block {event.done}/{event.total} after {stamps[-1]:.1f} s", file=sys.stderr)
            if options.blocks and event.done >= options.blocks:
                raise Enough

    with contextlib.suppress(Enough):
        report = ptq.quantize(options.folder, on_event=note, restart=True, **arguments)
        found = {
            "timing": report.timing,
            "flops": report.environment["flops"],
            "offload": report.environment["offload"],
            "windows": report.windows,
        }
    return {"seconds": time.perf_counter() - start, "blocks": stamps, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make")
    maker.add_argument("folder", type=Path)
    maker.add_argument("--shapes", choices=SHAPES, default="14b")
    maker.add_argument("--layers", type=int, default=42)
    maker.add_argument("--filled", type=int, default=2, help="blocks with random numbers in them")
    for name in ("rtn", "gptq", "coreq", "sliderquant"):
        runner = commands.add_parser(name)
        runner.add_argument("folder")
        runner.add_argument("out")
        runner.add_argument("--blocks", type=int, default=0, help="stop after so many")
        runner.add_argument("--samples", type=int, default=8)
        runner.add_argument("--seqlen", type=int, default=512)
        runner.add_argument("--offload", default="auto")
        runner.add_argument("--forecast", action="store_true", help="only say what it would take")
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, options.shapes, options.layers, options.filled)
    else:
        quantize(options)


if __name__ == "__main__":
    main()
