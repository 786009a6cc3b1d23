#!/usr/bin/env python3
"""llm-compressor's NVFP4 and MXFP4 beside ours: the same calibration tokens, scored by our evaluator.

    python benchmarks/export_tokens.py MODEL TOKENS.safetensors --calib c4.txt@0:0.8 --samples 16 --seqlen 512
    LLMCOMPRESSOR/bin/python benchmarks/quality/peers_fp4.py make MODEL TOKENS.safetensors WORK
    python benchmarks/quality/peers_fp4.py ours MODEL TOKENS.safetensors WORK
    python benchmarks/quality/peers_fp4.py score MODEL WORK --text wikitext2-raw-test.txt --max-tokens 16384

``make`` runs in an environment with llm-compressor (``benchmarks/peers/make_envs.sh``), the other two in ours. A folder
or score that is there is not made again. Scores are printed and appended to ``WORK/scores.jsonl`` one by one. Both
sides' weights are scored with inputs as they are; NVFP4 and MXFP4 also with their inputs rounded, by our layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

SCHEMES = ("NVFP4A16", "MXFP4A16", "NVFP4", "MXFP4")
PEER_METHODS = ("rtn", "gptq")
OUR_METHODS = ("rtn", "gptq", "coreq")


def main() -> None:
    options = parse()
    {"make": make, "ours": ours, "score": score}[options.step](options)


def make(options: argparse.Namespace) -> None:
    """llm-compressor's checkpoints."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = load_file(options.tokens)["tokens"]
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    modifiers = {"rtn": QuantizationModifier, "gptq": GPTQModifier}
    for method, scheme, out in _wanted(options, "llmcompressor", PEER_METHODS):
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        start = time.perf_counter()
        oneshot(
            model=model,
            dataset=data,
            recipe=[modifiers[method](targets="Linear", scheme=scheme, ignore=["lm_head"])],
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
            shuffle_calibration_samples=False,
        )
        seconds = time.perf_counter() - start
        model.save_pretrained(out, save_compressed=True)
        AutoTokenizer.from_pretrained(options.model).save_pretrained(out)
        _done(out, seconds)


def ours(options: argparse.Namespace) -> None:
    """Our checkpoints with the defaults of each method."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    import ptq
    from calib.data.tokens import Calibration, tokenizer_hash

    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    tokens = load_file(options.tokens)["tokens"]
    calibration = Calibration(tokens, options.tokens, 0, tokenizer_hash(tokenizer))
    for method, scheme, out in _wanted(options, "ptq", OUR_METHODS):
        start = time.perf_counter()
        needed = {} if method == "rtn" and scheme != "NVFP4" else {"calibration": calibration}
        ptq.quantize(options.model, out=out, method=method, preset=scheme, device="cpu", **needed)
        _done(out, time.perf_counter() - start)


def score(options: argparse.Namespace) -> None:
    """KL to the full model and perplexity of every checkpoint that is there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ptq
    from evals import evaluate

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    scores = options.work / "scores.jsonl"
    known = {json.loads(line)["name"] for line in scores.read_text().splitlines()} if scores.exists() else set()
    for folder in sorted(path.parent for path in options.work.glob("*/seconds.json")):
        if folder.name in known:
            continue
        model = ptq.load(folder, dtype=torch.float32).eval()
        (text,) = evaluate(
            model,
            tokenizer,
            texts=[options.text],
            against=base,
            seqlen=options.seqlen,
            bos="never",
            max_tokens=options.max_tokens,
        ).texts
        seconds = json.loads((folder / "seconds.json").read_text())
        found = {"name": folder.name, "perplexity": text.perplexity, "kl": text.divergence.kl_mean, "seconds": seconds}
        with scores.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found) + "\n")
        print(f"{folder.name:28} perplexity {text.perplexity:8.3f} KL {text.divergence.kl_mean:.5f}", flush=True)


def _wanted(options: argparse.Namespace, peer: str, methods: tuple[str, ...]) -> list[tuple[str, str, Path]]:
    """Method, scheme and folder of what is asked for and not there."""
    found = []
    for scheme in options.schemes:
        for method in (one for one in methods if one in options.methods):
            out = options.work / f"{scheme}-{peer}-{method}"
            if not (out / "seconds.json").exists():
                found.append((method, scheme, out))
    return found


def _done(out: Path, seconds: float) -> None:
    (out / "seconds.json").write_text(json.dumps(seconds) + "\n", encoding="utf-8")
    print(f"{out.name}: {seconds:.0f} s", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("make", "ours", "score"):
        step: Any = steps.add_parser(name)
        step.add_argument("model", help="folder of the full model")
        if name != "score":
            step.add_argument("tokens", help="safetensors file of benchmarks/export_tokens.py")
        step.add_argument("work", type=Path, help="folder for the checkpoints and scores")
        step.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
        step.add_argument("--methods", nargs="+", choices=OUR_METHODS, default=list(OUR_METHODS))
        if name == "score":
            step.add_argument("--text", default="wikitext2")
            step.add_argument("--seqlen", type=int, default=1024)
            step.add_argument("--max-tokens", type=int, default=16384)
    return parser.parse_args()


if __name__ == "__main__":
    main()
