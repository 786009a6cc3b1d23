#!/usr/bin/env python3
"""Seconds of a quantization on a quiet machine, and beside one and four processes that take the same cores.

    python benchmarks/speed/busy.py MODEL --calib c4.txt --samples 32 --seqlen 512 --cores 0,1 --repeats 3 > busy.json

Run it on a machine that does nothing else: the record has the load average before each run. Every run and every
competitor, an endless loop of one thread, is bound to the cores given, so that they share nothing but these. Two shares
are stated:

* ``fair``: what a fair scheduler leaves to one runnable thread per core, ``cores / (cores + competitors)``;
* ``taken``: what the run had, its CPU seconds over ``cores x wall seconds``.

``ratio`` is ``wall x share / idle wall`` with the fair share; 1 is a run that slows down exactly as its share does,
and 2.5 the limit. ``cpu_ratio`` is CPU seconds over idle CPU seconds: what is above 1 was spent on waiting or on a
colder cache. Prints one JSON object; a run that exceeds ``--limit`` seconds counts as that long and is marked. What
stands behind ``--`` goes to ``ptq quantize`` as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cli.shared.terminal.waiting import SPIN_CHOICES
from ptq.pipeline.preparation.preflight import cpu_name

LIMIT = 2.5  # of the ratio
_SPIN = "while True: pass"


def main() -> None:
    given = parse()
    cores = sorted(int(core) for core in given.cores.split(","))
    os.sched_setaffinity(0, cores)  # children inherit it
    runs: dict[int, list[dict[str, Any]]] = {}
    for count in (0, *given.competitors):
        runs[count] = []
        for _ in range(given.repeats):
            with competitors(count):
                runs[count].append(quantize(given, cores))
    print(json.dumps(record(given, cores, runs), indent=1))


@contextlib.contextmanager
def competitors(count: int) -> Iterator[None]:
    """``count`` processes that use a core whenever they get one, ended when the block is left."""
    running = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def quantize(given: argparse.Namespace, cores: Sequence[int]) -> dict[str, Any]:
    """One quantization as a process of its own: wall seconds, CPU seconds, context switches, peak memory."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ptq-busy-") as folder, Path(folder, "log").open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command(given, folder), stdout=log, stderr=log, start_new_session=True)
        usage, code, over = wait(process, given.limit)
        wall = time.perf_counter() - started
        if code and not over:
            sys.exit(f"{' '.join(command(given, folder))} failed:\n{Path(folder, 'log').read_text()[-2000:]}")
        report = None if over else json.loads(Path(folder, "out", "ptq_report.json").read_text())
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "wall": wall,
        "cpu": cpu,
        "system": usage.ru_stime,
        "taken": cpu / (len(cores) * wall),
        "voluntary_switches": usage.ru_nvcsw,
        "involuntary_switches": usage.ru_nivcsw,
        "peak_memory": usage.ru_maxrss * 1024,
        "load_before": load,
        "over_limit": over,
        "seconds": None if report is None else report["totals"]["seconds"],
        "timing": None if report is None else report["timing"],
        "threads": None if report is None else report["environment"]["threads"],
    }


def command(given: argparse.Namespace, folder: str) -> list[str]:
    line = [sys.executable, "-m", "cli.main", "quantize", given.model, "-o", f"{folder}/out"]
    line += ["--method", given.method, "--bits", "3", "--group-size", "64", "--calib", given.calib]
    return [*line, "--calib-samples", str(given.samples), "--calib-seqlen", str(given.seqlen), *given.more]


def wait(process: subprocess.Popen[bytes], limit: float) -> tuple[Any, int, bool]:
    """Resources, exit code and whether the process was ended because of the limit."""
    deadline = time.perf_counter() + limit
    over = False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage, process.returncode, over
        if not over and time.perf_counter() > deadline:
            over = True
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)


def record(given: argparse.Namespace, cores: Sequence[int], runs: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    idle = median(runs[0], "wall")
    idle_cpu = median(runs[0], "cpu")
    rows = []
    for count, found in runs.items():
        wall, fair = median(found, "wall"), len(cores) / (len(cores) + count)
        rows.append(
            {
                "competitors": count,
                "wall": wall,
                "cpu": median(found, "cpu"),
                "share": {"fair": fair, "taken": median(found, "taken")},
                "ratio": wall * fair / idle,
                "cpu_ratio": median(found, "cpu") / idle_cpu,
                "within_limit": wall * fair / idle <= LIMIT,
                "runs": found,
            }
        )
    return {
        "record": "ptq-busy",
        "command": command(given, "FOLDER"),
        "cores": list(cores),
        "repeats": given.repeats,
        "limit_seconds": given.limit,
        "rows": rows,
        "environment": {
            "device_name": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "variables": {name: os.environ[name] for name in ("OMP_NUM_THREADS", *SPIN_CHOICES) if name in os.environ},
        },
    }


def median(runs: Sequence[dict[str, Any]], name: str) -> float:
    return float(statistics.median(run[name] for run in runs))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", default="c4")
    parser.add_argument("--method", default="coreq")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--cores", default="0,1", help="the cores that runs and competitors share")
    parser.add_argument("--competitors", type=int, nargs="+", default=[1, 4], help="how many processes beside the run")
    parser.add_argument("--repeats", type=int, default=1, help="runs per row, of which the median counts")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a run is ended")
    line = sys.argv[1:]
    mine, more = (line[: line.index("--")], line[line.index("--") + 1 :]) if "--" in line else (line, [])
    given = parser.parse_args(mine)
    given.more = more
    return given


if __name__ == "__main__":
    main()
