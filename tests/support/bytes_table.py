"""What small runs write, as SHA-256 of every shard: moving and renaming code must change none of these bytes.

``tests/test_bytes.py`` holds the runs of `CASES` to the table in ``tests/support/data/bytes.json``. Floating-point
results differ between versions of torch and kinds of CPU, so a row of the table belongs to an `environment`: versions,
the vector instructions in use, and a probe, the hash of what torch and transformers compute on their own. Where the
environment is unknown the test skips. A change that is meant to change bytes rewrites the table and says so in its
commit:

    python -m tests.support.bytes_table --write
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor

import ptq
from calib.data.tokens import Calibration
from ptq.pipeline.events import Event
from tests.support.tiny_models import tiny_model

TABLE = Path(__file__).parent / "data" / "bytes.json"
TOKENS = torch.arange(8 * 16).reshape(8, 16).mul(37).remainder(397).add(2)
CALIBRATION = Calibration(TOKENS, "test", 1, "none")
NARROWER = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Variables that make a wider CPU compute as one with AVX2 does."""

Case = dict[str, Any]
_ACTIVATIONS: Case = {"act_bits": 8, "kv_bits": 8, "symmetric": False}
_MIXTURE: Case = {"family": "qwen2_moe"}


def _learned(method: str, **options: Any) -> Case:
    return {"method": method, "iters": 4, "batch": 4, **options}


CASES: dict[str, Case] = {
    "rtn sym": {"method": "rtn"},
    "rtn asym": {"method": "rtn", "symmetric": False},
    "rtn minmax per channel": {"method": "rtn", "scales": "minmax", "group_size": None, "bits": 8},
    "rtn hessian ragged": {"method": "rtn", "scales": "hessian", "group_size": 24, "bits": 2},
    "rtn experts": {"method": "rtn", "symmetric": False, **_MIXTURE},
    "gptq fp4": {"method": "gptq", "format": "fp4", "bits": 4},
    "rtn nvfp4": {"method": "rtn", "format": "nvfp4", "act_format": "nvfp4", "bits": 4},
    "llm-fp4": {"method": "llm-fp4", "bits": 4, "group_size": None, "act_bits": 4},
    "rtn bfloat16": {"method": "rtn", "dtype": torch.bfloat16, "bits": 4},
    "gptq sym": {"method": "gptq"},
    "gptq asym": {"method": "gptq", "symmetric": False},
    "gptq per channel": {"method": "gptq", "group_size": None, "bits": 4},
    "gptq dynamic groups": {"method": "gptq", "act_order": False, "static_groups": False, "symmetric": False},
    "gptq native": {"method": "gptq", "format": "native", "bits": 5},
    "gptq compressed-tensors": {"method": "gptq", "format": "compressed-tensors", "bits": 4},
    "gptq experts": {"method": "gptq", **_MIXTURE},
    "gptq fused": {"method": "gptq", "family": "phi3", "symmetric": False},
    "gptaq sym": {"method": "gptaq"},
    "gptaq asym": {"method": "gptaq", "symmetric": False},
    "gptaq ragged": {"method": "gptaq", "group_size": 24, "symmetric": False, "bits": 4},
    "coreq sym": {"method": "coreq"},
    "coreq asym": {"method": "coreq", "symmetric": False},
    "coreq per channel": {"method": "coreq", "group_size": None, "symmetric": False},
    "coreq ragged": {"method": "coreq", "group_size": 40, "bits": 2},
    "coreq beam": {"method": "coreq", "beam": 3, "cd_passes": 1, "order": "min_pivot"},
    "coreq cross-validated": {"method": "coreq", "coefficient": "cv", "scales": "hessian"},
    "coreq shrunk": {"method": "coreq", "coefficient": "js", "symmetric": False},
    "coreq experts": {"method": "coreq", "family": "gpt_oss"},
    "coreq Conv1D": {"method": "coreq", "family": "gpt2", "symmetric": False},
    "coreq overrides": {
        "method": "coreq",
        "overrides": (("*.down_proj", ptq.Scheme(6, group_size=32)),),
        "ignore": ("*.layers.0.*.q_proj",),
    },
    "itq3s": {"method": "itq3s", "group_size": 256},
    "itq3s coreq": {"method": "itq3s", "solver": "coreq", "group_size": 256},
    "coreq rotated": {"method": "coreq", "rotate": ("residual", "down")},
    "gptq residual": {"method": "gptq", "rotate": ("residual",), "symmetric": False},
    "gptq down activations": {"method": "gptq", "rotate": ("down",), **_ACTIVATIONS},
    "sliderquant sym": _learned("sliderquant"),
    "sliderquant asym": _learned("sliderquant", symmetric=False),
    "sliderquant from gptq": _learned("sliderquant", init="gptq", bits=2),
    "sliderquant rotated": _learned("sliderquant", rotate=("residual", "down"), **_ACTIVATIONS),
    "sliderquant-lora sym": _learned("sliderquant-lora"),
    "sliderquant-lora asym": _learned("sliderquant-lora", symmetric=False, group_size=24),
    "sliderquant-lora soft": _learned("sliderquant-lora", rounding="soft", lr_offset=0.1),
    "sliderquant-lora activations": _learned("sliderquant-lora", **_ACTIVATIONS),
    "omniquant sym": _learned("omniquant"),
    "omniquant asym": _learned("omniquant", symmetric=False, group_size=None),
    "omniquant activations": _learned("omniquant", **_ACTIVATIONS),
    "autoround sym": _learned("autoround"),
    "autoround asym": _learned("autoround", symmetric=False, group_size=24),
    "autoround experts": _learned("autoround", **_MIXTURE),
}
"""Arguments of `ptq.quantize` by the name of the case; ``family`` and ``dtype`` say which tiny model."""


def write_case(name: str, folder: Path, listener: Callable[[Event], None] = lambda event: None) -> dict[str, str]:
    """Run a case in ``folder``, on one thread; SHA-256 of every shard by its name."""
    options = {"bits": 3, "group_size": 16, **CASES[name]}
    source = folder / "model"
    if not source.exists():
        tiny_model(options.get("family", "llama"), options.get("dtype", torch.float32)).save_pretrained(source)
    options = {key: value for key, value in options.items() if key not in ("family", "dtype")}
    with _one_thread():
        ptq.quantize(
            source,
            out=folder / "out",
            calibration=CALIBRATION,
            device="cpu",
            offload="memory",
            on_event=listener,
            **options,
        )
    shards = sorted((folder / "out").glob("*.safetensors"))
    return {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards}


def environment() -> str:
    """What the bytes depend on besides this code: equal strings, equal floating-point results."""
    versions = (("torch", torch), ("transformers", transformers), ("safetensors", safetensors))
    names = [f"{name} {str(module.__version__).partition('+')[0]}" for name, module in versions]  # any build of it
    return ", ".join([*names, torch.backends.cpu.get_cpu_capability(), f"probe {_probe()}"])


def known(table: Path = TABLE) -> dict[str, dict[str, dict[str, str]]]:
    """The table: environment, case, shard, SHA-256."""
    rows: dict[str, dict[str, dict[str, str]]] = json.loads(table.read_text(encoding="utf-8"))
    return rows


def _probe() -> str:
    """Hash of what the libraries compute without this project: forward, backward, factorizations, random numbers."""
    found = hashlib.sha256()
    with _one_thread():
        for tensor in _probed():
            found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _probed() -> Iterator[Tensor]:
    for family in ("llama", "qwen2_moe", "gpt2"):
        model = tiny_model(family)
        yield from model.parameters()
        logits = model(input_ids=TOKENS).logits
        logits.square().mean().backward()
        yield logits
        yield from (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    generator = torch.Generator().manual_seed(0)
    for width, dtype in ((64, torch.float32), (96, torch.float32), (96, torch.float64)):
        inputs = torch.randn(128, width, generator=generator, dtype=dtype)
        moments = inputs.T @ inputs + torch.eye(width, dtype=dtype)
        factor = torch.linalg.cholesky(moments)
        yield torch.cholesky_inverse(factor)
        yield torch.linalg.solve_triangular(factor, inputs.T, upper=False)
        yield torch.linalg.qr(moments)[0]
        yield (inputs.bfloat16() @ moments.bfloat16()).float()
        yield inputs.abs().pow(2.4).sum(dim=-1)
        yield inputs.sigmoid() + inputs.exp().sum(dim=0)


def write_table(table: Path = TABLE) -> None:
    """Write the rows that this machine can compute: its own, and that of a CPU with AVX2.

    A case whose bytes changed is taken out of the rows of other environments, which would hold the old ones.
    """
    before = known(table) if table.exists() else {}
    after: dict[str, dict[str, dict[str, str]]] = {}
    for variables in ({}, NARROWER):
        command = [sys.executable, "-m", "tests.support.bytes_table", "--row"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **variables})
        after.update(json.loads(done.stdout))
    changed = {
        case
        for name in before.keys() & after.keys()
        for case in before[name].keys() | after[name].keys()
        if before[name].get(case) != after[name].get(case)
    }
    for name, row in before.items():
        after.setdefault(name, {case: shards for case, shards in row.items() if case not in changed})
    text = json.dumps(dict(sorted(after.items())), indent=1)
    table.write_text(text + "\n", encoding="utf-8")
    print(f"{len(after)} rows of {len(CASES)} cases; changed: {', '.join(sorted(changed)) or 'none'}")


def _row() -> Mapping[str, dict[str, dict[str, str]]]:
    transformers.utils.logging.disable_progress_bar()
    row = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            row[name] = write_case(name, Path(folder))
    return {environment(): row}


def main() -> None:
    """``--write``: write the table; ``--row``: print the row of this environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument("--write", action="store_true", help="write the rows that this machine can compute")
    wish.add_argument("--row", action="store_true", help="print the row of this environment as JSON")
    if parser.parse_args().write:
        write_table()
    else:
        json.dump(_row(), sys.stdout)


if __name__ == "__main__":
    main()
