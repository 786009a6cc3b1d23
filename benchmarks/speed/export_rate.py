#!/usr/bin/env python3
"""How fast `ptq export` writes, beside the disk itself, and how much memory it takes.

    python benchmarks/speed/large_model.py make MODEL --shapes 1b --layers 8 --filled 8   # 1.1 GB
    ptq quantize --method rtn --bits 4 --group-size 32 --container native --scale-dtype float16 MODEL -o OUT
    python benchmarks/speed/export_rate.py OUT FOLDER gptq compressed-tensors bf16 gguf

The disk's rate is that of one file of random bytes in pieces of 8 MiB with a sync at the end, as large as the largest
export. Exports run in processes of their own, whose imports are not counted; their last sync is. Prints one JSON object
per line: the disk, then the formats.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

PIECE = 8 << 20


def disk_rate(folder: Path, size: int) -> float:
    """Bytes per second of sequential writing, synced."""
    piece, path = os.urandom(PIECE), folder / "disk.bin"
    start = time.monotonic()
    with path.open("wb") as file:
        for _ in range(size // PIECE):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - start
    path.unlink()
    return (size // PIECE) * PIECE / seconds


def export_once(result: Path, name: str, out: Path) -> None:
    """One export in this process; prints seconds, bytes and peak memory."""
    from ptq.export import export

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    export(result, format=name, out=out)
    seconds = time.monotonic() - start
    files = [out] if out.is_file() else list(out.glob("*.safetensors"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({
        "format": name,
        "seconds": round(seconds, 2),
        "bytes": sum(file.stat().st_size for file in files),
        "peak_mib": peak // 1024,
        "peak_beyond_imports_mib": (peak - before) // 1024,
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="An output of ptq quantize.")
    parser.add_argument("folder", type=Path, help="Where to write; on the disk to be measured.")
    parser.add_argument("formats", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        export_once(given.result, given.formats[0], given.folder)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    shard = max(path.stat().st_size for path in given.result.glob("*.safetensors"))
    rates = [disk_rate(given.folder, 1 << 30) for _ in range(given.repeats)]
    rate = statistics.median(rates)
    print(json.dumps({"disk_mib_per_s": [round(one / 2**20) for one in rates], "largest_shard_mib": shard >> 20}))
    for name in given.formats:
        rows = []
        for _ in range(given.repeats):
            out = given.folder / ("export.gguf" if name == "gguf" else "export")
            command = [sys.executable, __file__, str(given.result), str(out), name, "--once"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        row = sorted(rows, key=lambda one: one["seconds"])[len(rows) // 2]
        written = row["bytes"] / row["seconds"]
        print(json.dumps({**row, "mib_per_s": round(written / 2**20), "of_disk": round(written / rate, 2)}), flush=True)


if __name__ == "__main__":
    main()
