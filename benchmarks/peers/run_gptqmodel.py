"""GPTQModel's GPTQ or GPTAQ with its own defaults; then the same weights dense, from its own loader, for evaluation.

    DIR/gptqmodel/bin/python run_gptqmodel.py MODEL TOKENS OUT --method gptaq

Writes the packed checkpoint to OUT/packed and a dense one, dequantized by the peer's own code, to OUT.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# With two cores or fewer, 7.6.0 gives its pool of CPU workers one thread and then refuses to start. Read at import.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig
from measured import BITS, GROUP_SIZE, arguments, peak_mib, read_tokens, timed, write_record
from safetensors.torch import load_file, save_file


def main() -> None:
    options = arguments(__doc__, ["gptq", "gptaq"])
    ids = read_tokens(options.tokens).tolist()
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    extra = {"gptaq": GPTAQConfig()} if options.method == "gptaq" else {}
    config = QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, sym=True, device="cpu", **extra)
    model = GPTQModel.load(options.model, config, dtype=torch.bfloat16)
    _, figures = timed(lambda: model.quantize(data))
    figures["peak_mib"] = peak_mib()
    packed = options.out / "packed"
    _, saving = timed(lambda: model.save(str(packed)))
    figures["save_seconds"] = saving["seconds"]
    write_dense(Path(options.model), packed, options.out)
    write_record(options.out, "GPTQModel", options.method, ("gptqmodel", "torch", "transformers"), figures)


def write_dense(source: Path, packed: Path, out: Path) -> None:
    """The source's folder with the quantized linears replaced by their dequantized values, in the source's dtype."""
    loaded = GPTQModel.load(str(packed), device="cpu", backend=BACKEND.GPTQ_TORCH)
    linears = {name: module for name, module in loaded.model.named_modules() if hasattr(module, "dequantize_weight")}
    if not linears:
        raise SystemExit(f"error: nothing in {packed} is quantized")
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, out)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name in list(tensors):
            module = linears.pop(name.removesuffix(".weight"), None)
            if module is not None:
                weight = module.dequantize_weight().T[:, : tensors[name].shape[1]]
                tensors[name] = weight.to(tensors[name].dtype).contiguous()
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    if linears:
        raise SystemExit(f"error: {sorted(linears)[0]} is quantized but not in {source}")


if __name__ == "__main__":
    main()
