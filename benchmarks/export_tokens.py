#!/usr/bin/env python3
"""The tokens that ``ptq quantize`` would calibrate on, as a file that other toolkits can be given.

    python benchmarks/export_tokens.py MODEL TOKENS.safetensors --calib 'c4.txt@0:0.8' --samples 128 --seqlen 2048

Writes ``tokens``, int64 [samples, seqlen], with the certificate of the draw in the file's metadata, and prints that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoTokenizer

from calib.data.tokens import load_calibration


def main() -> None:
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    drawn = load_calibration(
        options.calib, tokenizer, samples=options.samples, seqlen=options.seqlen, seed=options.seed
    )
    certificate = json.dumps(drawn.describe() | {"source": Path(options.calib).name}, indent=1)
    options.tokens.parent.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": drawn.tokens.contiguous()}, options.tokens, metadata={"calibration": certificate})
    print(certificate)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with the tokenizer")
    parser.add_argument("tokens", type=Path, help="the file to write")
    parser.add_argument("--calib", required=True, help="calibration text, as for ptq quantize")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
