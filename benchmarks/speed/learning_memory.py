#!/usr/bin/env python3
"""Peak GPU memory of a learned run, beside what its largest window has to hold.

    python benchmarks/speed/learning_memory.py MODEL --calib 'c4.txt@0:0.8' --method sliderquant --bits 2 \\
        --group-size 64

Prints one JSON line. ``needed`` is the sum of: the largest window's weights; their copies, gradients and optimizer
state, counted by shapes; and what autograd keeps of one batch, counted by its own hooks while the run learns (every
storage once; it holds the rounded weights, too). Where ``--offload none`` leaves the streams on the GPU, their bytes
are told apart. The measured peak is torch's, of allocated memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

import ptq
from calib.checkpoint.reader import open_model
from calib.data.tokens import load_calibration
from calib.model.structure import find_blocks
from ptq.methods import METHODS


@dataclasses.dataclass
class Kept:
    """Bytes of the storages that autograd keeps at this moment, and the most there were."""

    now: int = 0
    most: int = 0
    holders: dict[int, int] = dataclasses.field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Holder:
        return Holder(tensor, self)


class Holder:
    """A kept tensor; the last one of a storage that goes takes its bytes along."""

    def __init__(self, tensor: Tensor, kept: Kept) -> None:
        self.tensor, self.kept = tensor, kept
        storage = tensor.untyped_storage()
        self.key, self.bytes = storage.data_ptr(), storage.nbytes()
        count = kept.holders.get(self.key, 0)
        kept.holders[self.key] = count + 1
        if count == 0:
            kept.now += self.bytes
            kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self.kept.holders[self.key] -= 1
        if not self.kept.holders[self.key]:
            del self.kept.holders[self.key]
            self.kept.now -= self.bytes


def main() -> None:
    given = parse()
    tokens = load_calibration(
        given.calib, AutoTokenizer.from_pretrained(given.model), samples=given.samples, seqlen=given.seqlen, seed=0
    )
    options = {"iters": given.iters, "batch": given.batch}
    on_gpu = given.device.startswith("cuda")
    kept = Kept()
    with tempfile.TemporaryDirectory() as folder:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda holder: holder.tensor):
            report = ptq.quantize(
                given.model,
                out=Path(folder) / "out",
                method=given.method,
                bits=given.bits,
                group_size=given.group_size or None,
                symmetric=False,
                calibration=tokens,
                device=given.device,
                offload=given.offload,
                **options,
            )
    source = open_model(given.model)
    blocks = [source.skeleton.get_submodule(name) for name in find_blocks(source.skeleton)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    config = METHODS[given.method].config(**options)
    largest = max(sum(sizes[w.start : w.stop]) for w in config.windows(len(blocks)))
    dense = config.rounding != "nearest"
    moments = 0 if config.optimizer == "sign" else 8
    item = 2 if report.environment["pass_dtype"] != "float32" else 4
    parts = {
        "weights": largest * item,
        "copies": largest * (4 + (4 + moments + 4 if dense else 0)),  # float32 weight; offset, its gradient and moments
        "kept_by_autograd": kept.most,
    }
    hidden = source.skeleton.config.get_text_config().hidden_size
    record = {
        "record": "ptq-learning-memory",
        "options": {k: v for k, v in vars(given).items() if k not in ("model", "calib")},
        "parts": parts,
        "needed": sum(parts.values()),
        "stream": given.samples * given.seqlen * hidden * item,
        "peak_device": report.environment.get("peak_device"),
        "peak_memory": report.environment["peak_memory"],
        "device_name": report.environment.get("device_name"),
    }
    if on_gpu:
        record["ratio"] = record["peak_device"] / record["needed"]
    print(json.dumps(record))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--method", default="sliderquant")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iters", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--offload", default="none", choices=("none", "memory", "disk"))
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
