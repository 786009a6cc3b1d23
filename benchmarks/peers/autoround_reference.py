#!/usr/bin/env python3
"""Intel's auto-round on given tokens, in its own environment; the result dense, for evaluation, and what it took.

    python benchmarks/export_tokens.py MODEL TOKENS.safetensors --calib 'c4.txt@0:0.8' --samples 128 --seqlen 2048
    ENV/bin/python benchmarks/peers/autoround_reference.py MODEL TOKENS.safetensors OUT --bits 3 --group-size 64 --asym

Writes a Hugging Face folder whose linears hold the tuned, dequantized weights in the source's dtype, and
OUT/record.json. Everything that is not an argument here is the package's default, and so noted in the record; its
``torch.compile`` is on by default and is switched on here with ``--compile``.

Needs of the package's requirements only py-cpuinfo, pydantic and what transformers brings.

Two habits of the package to know. The last token of every sequence, and every padding token, is left out of the loss.
Tokens handed over as data get an attention mask that hides the last one, and with it a slower attention; its own text
data sets get none. So the tokens go in where those data sets are cut into batches; ``--plain-data`` is the other way.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's client is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from measured import peak_mib, timed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def main() -> None:
    options = parse()
    with safe_open(options.tokens, "pt") as file:
        tokens, metadata = file.get_tensor("tokens"), file.metadata() or {}
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(options.batch)]
    prepare(batches)
    run = build(options, tokens, [part["input_ids"] for part in batches])
    (model, _), figures = timed(lambda: finished(run.quantize, options.device))
    linears = tuned(model)
    write_dense(Path(options.model), linears, options.out)
    record = {
        "record": "autoround-reference",
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        **figures,
        "peak_mib": peak_mib(),
        "peak_device_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
        "linears": len(linears),
        "tokens": list(tokens.shape),
        "calibration": json.loads(metadata.get("calibration", "null")),
        "settings": settings(run),
        "environment": environment(options.device),
    }
    (options.out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: record[name] for name in ("seconds", "peak_mib", "peak_device_mib", "linears")}))


def prepare(batches: list[dict[str, Tensor]]) -> None:
    """Before the package is imported: its module of data sets is replaced by one that has the tokens.

    So `datasets`, with 250 MB of what it needs, can be missing. Whether it is there transformers has asked by then.
    """
    transformers.utils.is_datasets_available()
    if importlib.util.find_spec("datasets") is None:
        stand_in("datasets", load_dataset=None)
    stand_in("auto_round.calib_dataset", get_dataloader=lambda *args, **kwargs: batches)


def stand_in(name: str, **members: Any) -> None:
    """A module with nothing but ``members`` in the place of another."""
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    sys.modules[name] = module


def build(options: argparse.Namespace, tokens: Tensor, data: list[Tensor]) -> Any:
    """The package's object with the model read, and nothing done yet."""
    from auto_round import AutoRound, SignRoundConfig

    samples, seqlen = tokens.shape
    debugging = {"to_quant_block_names": [options.blocks]} if options.blocks else {}
    return AutoRound(
        options.model,
        scheme="W4A16",  # weight-only integers; the config's figures replace the preset's
        alg_configs=SignRoundConfig(
            iters=options.iters, bits=options.bits, group_size=options.group_size or -1, sym=options.sym
        ),
        dataset=data if options.plain_data else "the given tokens",
        seqlen=seqlen,
        nsamples=samples,
        batch_size=options.batch,
        seed=options.seed,
        device_map=options.device,
        enable_torch_compile=options.compile,
        trust_remote_code=False,
        amp=options.amp,
        **debugging,
    )


def finished(call: Any, device: str) -> Any:
    """The call's result when the device has done its work."""
    result = call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return result


def tuned(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that were tuned, by name, checked to hold no more levels a group than their bits allow."""
    linears: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and getattr(module, "bits", 16) < 16 and hasattr(module, "scale")
    }
    if not linears:
        raise SystemExit("error: auto-round quantized nothing")
    for name, module in linears.items():
        rows = module.weight.detach()[:4].cpu()  # whole groups of the first rows
        width = module.group_size if module.group_size > 0 else rows.shape[1]
        levels = max(part.unique().numel() for row in rows for part in row.split(width))
        if levels > 2**module.bits:
            raise SystemExit(f"error: a group of {name} has {levels} values, more than {2**module.bits}")
    return linears


def write_dense(source: Path, linears: dict[str, nn.Linear], out: Path) -> None:
    """The source's folder with the tuned weights, in the source's dtype."""
    out.mkdir(parents=True, exist_ok=True)
    left = dict(linears)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, out)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            module = left.pop(name.removesuffix(".weight"), None) if name.endswith(".weight") else None
            if module is not None:
                tensors[name] = module.weight.detach().to("cpu", tensors[name].dtype).contiguous()
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    if left:
        raise SystemExit(f"error: {sorted(left)[0]} was quantized but is not in {source}")


def settings(run: Any) -> dict[str, Any]:
    """What decided the result, as the package resolved it."""
    config = run.quantize_config
    names = ("bits", "group_size", "sym", "data_type", "iters", "lr", "minmax_lr", "momentum", "nblocks")
    names += ("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "enable_alg_ext")
    names += ("gradient_accumulate_steps", "not_use_best_mse")
    found = {name: getattr(config, name, None) for name in names}
    context = run.model_context
    return found | {
        "scale_dtype": str(run.scale_dtype),
        "amp": context.amp,
        "amp_dtype": str(context.amp_dtype),
        "torch_compile": run.enable_torch_compile,
        "attention": getattr(context.model.config, "_attn_implementation", None),
    }


def environment(device: str) -> dict[str, Any]:
    packages = ("auto-round", "torch", "transformers", "accelerate")
    on_gpu = device.startswith("cuda")
    return {
        "versions": {package: version(package) for package in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the full model")
    parser.add_argument("tokens", type=Path, help="safetensors file with tokens int64 [samples, seqlen]")
    parser.add_argument("out", type=Path, help="folder for the dense model and record.json")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128, help="0 is per channel")
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--asym", dest="sym", action="store_false", help="the same as --no-sym")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42, help="of the order of the samples")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--compile", action="store_true", help="torch.compile, the package's default")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 passes")
    parser.add_argument("--plain-data", action="store_true", help="tokens as a list of tensors, with their mask")
    parser.add_argument("--blocks", nargs="+", help="tune these blocks only, e.g. model.layers.0: for debugging")
    return parser.parse_args()


if __name__ == "__main__":
    main()
