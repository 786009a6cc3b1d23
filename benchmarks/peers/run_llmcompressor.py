"""llm-compressor's GPTQ with its own defaults (static act-order, damping 0.01, batches of one sequence).

DIR/llmcompressor/bin/python run_llmcompressor.py MODEL TOKENS OUT
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from measured import BITS, GROUP_SIZE, arguments, peak_mib, read_tokens, timed, write_record
from transformers import AutoModelForCausalLM


def main() -> None:
    options = arguments(__doc__, ["gptq"])
    tokens = read_tokens(options.tokens)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, local_files_only=True)
    ids = tokens.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    weights = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = [GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]

    def call() -> None:
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
            shuffle_calibration_samples=False,
        )

    _, figures = timed(call)
    figures["peak_mib"] = peak_mib()
    _, saving = timed(lambda: model.save_pretrained(options.out, save_compressed=True))
    figures["save_seconds"] = saving["seconds"]
    packages = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    write_record(options.out, "llm-compressor", options.method, packages, figures)


if __name__ == "__main__":
    main()
