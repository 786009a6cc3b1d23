#!/usr/bin/env python3
"""Whether a quantization that SIGKILL ends at any moment goes on to the same bytes.

    python benchmarks/quality/kill_matrix.py -o record.json
    python benchmarks/quality/kill_matrix.py MODEL --methods coreq --random 20 --flags "--calib c4 --calib-samples 8"

For every method: one undisturbed run of ``ptq quantize`` in a process of its own; then one run killed after each
finished block (the journal is watched), and runs killed at random moments, every third of them again and again. Each
is then repeated to the end. Weights, index and config are compared byte for byte with those of the undisturbed run, and
finished shards have to be the very files of the result (inode and time of writing), not others that were computed
again. Prints one JSON object; exits with 1 if anything differs or a finished shard was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

LOCK = ".ptq_lock"
STAGING = ".ptq_partial"
JOURNAL = Path(STAGING, "journal.jsonl")
POLL = 0.001  # seconds between looks at the journal
AGAIN = 4  # kills of a run that is killed again and again
SMALL = "--bits 3 --group-size 16 --calib pydoc --calib-samples 8 --calib-seqlen 64 --device cpu"


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="ptq-kill-", dir=options.work) as name:
        work = Path(name).resolve()
        model = Path(options.model) if options.model else make_model(work / "model", options.blocks)
        methods = {method: Matrix(options, work, model, method).run() for method in options.methods}
    record = {
        "record": "ptq-kill-matrix",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": options.model or f"random llama, {options.blocks} blocks, hidden size 64",
        "flags": options.flags,
        "seed": options.seed,
        "versions": {package: version(package) for package in ("ptq-toolkit", "torch", "transformers")},
        "methods": methods,
    }
    text = json.dumps(record, indent=1)
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n", encoding="utf-8")
    return 0 if all(row["passed"] for row in methods.values()) else 1


@dataclasses.dataclass
class Outcome:
    """One run that was killed ``kills`` times and then repeated to the end.

    ``parts`` were finished when the last kill came, ``kept`` of them are the very files of the result.
    """

    where: str
    kills: int
    parts: int
    kept: int
    identical: bool
    seconds: float
    error: str | None = None


class Matrix:
    """All runs of one method."""

    def __init__(self, options: argparse.Namespace, work: Path, model: Path, method: str) -> None:
        self.options, self.work, self.model, self.method = options, work, model, method
        self.random = random.Random(f"{options.seed} {method}")
        self.count = 0

    def run(self) -> dict[str, Any]:
        """The method's row of the record."""
        out = self.fresh_folder()
        start = time.perf_counter()
        first = self.start(out)
        self.wait_for_parts(first, out, 0)
        begin = time.perf_counter()
        while first.poll() is None and not (out / "config.json").exists():
            time.sleep(POLL)
        work = time.perf_counter() - begin
        self.check(first)
        end = time.perf_counter() - start
        self.reference = result(out)
        parts = len(list(out.glob("*.safetensors")))
        outcomes = [self.killed_after(count) for count in range(parts + 1)]
        for number in range(self.options.random):
            outcomes.append(self.killed_at_random(parts, work / parts, AGAIN if number % 3 == 2 else 1))
        killed = [outcome for outcome in outcomes if outcome.kills]
        failed = [o for o in outcomes if not o.identical or o.kept != o.parts]
        return {
            "passed": not failed,
            "undisturbed_seconds": end,
            "seconds_of_parts": work,
            "parts": parts,
            "runs": len(outcomes),
            "kills": sum(outcome.kills for outcome in outcomes),
            "resumed": sum(outcome.parts > 0 for outcome in killed),
            "identical": sum(outcome.identical for outcome in outcomes),
            "finished_parts": sum(outcome.parts for outcome in outcomes),
            "kept_parts": sum(outcome.kept for outcome in outcomes),
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        }

    def killed_after(self, parts: int) -> Outcome:
        """A run that is killed as soon as the journal has ``parts`` finished parts."""
        out = self.fresh_folder()
        process = self.start(out)
        self.wait_for_parts(process, out, parts)
        return self.to_the_end(out, f"after part {parts}", int(kill(process)))

    def killed_at_random(self, parts: int, pause: float, times: int) -> Outcome:
        """A run that is killed up to ``times`` times, each time up to ``pause`` seconds after some part."""
        out, kills, moments = self.fresh_folder(), 0, list[str]()
        for _ in range(times):
            count, moment = self.random.randint(0, parts), self.random.uniform(0, pause)
            process = self.start(out)
            wait_for_lock(process, out)
            self.wait_for_parts(process, out, count)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            moments.append(f"{moment:.3f} s after part {count}")
            if not kill(process):
                break
            kills += 1
        return self.to_the_end(out, ", ".join(moments), kills)

    def to_the_end(self, out: Path, where: str, kills: int) -> Outcome:
        """The same command again, and what came of it."""
        finished = finished_shards(out)
        start, error = time.perf_counter(), None
        try:
            if kills:
                self.check(self.start(out))
        except RuntimeError as failure:
            error = str(failure)
        files = {identity(path) for path in out.glob("*.safetensors")}
        identical = error is None and result(out) == self.reference
        seconds = time.perf_counter() - start
        outcome = Outcome(where, kills, len(finished), len(finished & files), identical, seconds, error)
        print(f"{self.method}: {outcome}", file=sys.stderr, flush=True)
        return outcome

    # -- processes -----------------------------------------------------------------------------------------------------

    def fresh_folder(self) -> Path:
        self.count += 1
        return self.work / f"{self.method}-{self.count}"

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "cli.main", "quantize", str(self.model), "-o", str(out)]
        command += ["--method", self.method, *shlex.split(self.options.flags)]
        log = (self.work / "log").open("wb")
        with log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))

    def check(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a process.

        Raises:
            RuntimeError: it failed; with the end of what it said.
        """
        code = process.wait()
        if code:
            raise RuntimeError(f"exit code {code}: {(self.work / 'log').read_text(errors='replace')[-500:]}")

    def wait_for_parts(self, process: subprocess.Popen[bytes], out: Path, parts: int) -> None:
        """Until the journal has a header and ``parts`` parts, or the process has ended."""
        while process.poll() is None and lines(out) < 1 + parts:
            time.sleep(POLL)


def wait_for_lock(process: subprocess.Popen[bytes], out: Path) -> None:
    """Until the process has the output folder's lock open (what Linux shows of it), or has ended."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if any(link.readlink() == out / LOCK for link in Path(f"/proc/{process.pid}/fd").iterdir()):
                return
        time.sleep(POLL)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Send SIGKILL; whether it came before the process had ended by itself."""
    process.kill()
    return process.wait() < 0


def journal(out: Path) -> list[bytes]:
    """The whole lines of the journal."""
    try:
        return (out / JOURNAL).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def lines(out: Path) -> int:
    return len(journal(out))


def identity(path: Path) -> tuple[int, int]:
    """What stays when a file is moved and changes when it is written again: inode and time of writing."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def finished_shards(out: Path) -> set[tuple[int, int]]:
    """`identity` of the shards that the journal calls finished, also of those that were on their way to their place."""
    records = [json.loads(line) for line in journal(out)]
    names = next((r["names"] for r in records if r["kind"] == "finishing"), [])
    parts = [r["file"] for r in records if r["kind"] == "part"]
    shards = set()
    for index, file in enumerate(parts):
        staged = out / STAGING / file
        path = staged if staged.exists() or index >= len(names) else out / names[index]
        shards.add(identity(path))
    return shards


def result(out: Path) -> dict[str, str]:
    """SHA-256 of weights, index and config by their names."""
    paths = [*out.glob("*.safetensors"), *out.glob("*.safetensors.index.json"), *out.glob("config.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def make_model(folder: Path, blocks: int) -> Path:
    """A random Llama with a byte-level tokenizer, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model folder; a small random model by default")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "coreq"])
    parser.add_argument("--blocks", type=int, default=6, help="of the random model")
    parser.add_argument("--random", type=int, default=12, help="runs a method that are killed at random moments")
    parser.add_argument("--flags", default=SMALL, help="further flags of ptq quantize, in one string")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help="where the runs are written, instead of the folder for temporary files")
    parser.add_argument("-o", "--output", help="write the record there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
