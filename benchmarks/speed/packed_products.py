"""The CUDA kernels on this card: right against the reference, then how fast, each result a line of JSON at once.

    python benchmarks/speed/packed_products.py --out kernels.jsonl --rows correct,one,batches,decode,paths

One H100 takes about three minutes, and one more where the kernels must be compiled first. Timings are medians of CUDA
graphs over at least 1 GB of distinct weights; per cent are of the copy bandwidth of the same run (read + written).
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from packed_checks import correct
from packed_common import DEVICE, START, Lines
from packed_decode import decode
from packed_times import batches, one, paths

from ptq.runtime import cuda_products
from ptq.runtime.benchmark import copy_bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("kernels.jsonl"))
    parser.add_argument("--rows", default="correct,one,decode,batches,paths")
    arguments = parser.parse_args()
    lines = Lines(arguments.out)
    device = torch.cuda.get_device_properties(0)
    started = time.monotonic()
    reason = cuda_products._missing(0)
    lines.add(
        "machine",
        name=device.name,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        missing=reason,
        library_seconds=round(time.monotonic() - started, 1),
    )
    if reason is not None:
        raise SystemExit(1)
    copy = copy_bandwidth(DEVICE)
    lines.add("machine", copy_tb_per_s=round(copy / 1e12, 3))
    rows: dict[str, Callable[[], None]] = {
        "correct": lambda: correct(lines),
        "one": lambda: one(lines, copy),
        "batches": lambda: batches(lines, copy),
        "decode": lambda: decode(lines),
        "paths": lambda: paths(lines),
    }
    with torch.no_grad():
        for name in arguments.rows.split(","):
            try:
                rows[name]()
            except Exception as error:
                lines.add(name, error=repr(error)[:400])
                traceback.print_exc()
    lines.add("done", seconds=round(time.monotonic() - START, 1))


if __name__ == "__main__":
    main()
