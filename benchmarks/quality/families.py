#!/usr/bin/env python3
"""Every causal language model of transformers that can be built small: quantized, loaded again, and compared.

    python benchmarks/quality/families.py WORK -o families.json --minutes 25
    python benchmarks/quality/families.py WORK -o families.json --table families.md
    python benchmarks/quality/families.py WORK -o families.json --only falcon mamba2 --again

Each family of transformers' table of causal language models gets a small random model in bfloat16, rounded to 4 bits in
groups of 32, once symmetric and once with zero points. The result is loaded with ptq, and in a process without ptq
where the report says that stock transformers loads it. Both must give the logits of the full-precision model with
weights that the reader in families_reader.py takes out of the folder; it shares no code with ptq. Families that are
done are not done again; one that takes longer than its limit ends with the process that worked on it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from families_reader import expected_logits, run
from families_table import MAX_DISTANCE, summary, table

LIMIT, START = 120, 600  # seconds per family; for a start on a busy machine
WARM = ""  # the family that only starts processes
LARGEST = 20_000_000  # parameters of a model that counts as small
ANSWER = "answer: "
FILLED = {"head_dim": 16, "num_key_value_heads": 2}
"""What default configs leave open and some of their models need."""
CHANGES: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "lfm2_moe": {"num_hidden_layers": 2, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "xlm": {"emb_dim": 64, "n_words": 512},
    "xlnet": {"d_head": 16},
}
"""What the names of entries do not say about a family."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a folder for models, emptied after every family")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the record, JSON; continued where it is")
    parser.add_argument("--only", nargs="*", help="these families only")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no family after this time")
    parser.add_argument("--again", action="store_true", help="do again what is in the record")
    parser.add_argument("--table", type=Path, help="write the record as a markdown table and do nothing else")
    parser.add_argument("--serve", choices=["families", "stock"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.work, Stock(options.work).load if options.serve == "stock" else one_family)
    if options.table:
        options.table.write_text(table(json.loads(options.output.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    sweep(options)
    return 0


def sweep(options: argparse.Namespace) -> None:
    """All families one after the other; the record is written after each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    record = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {"families": {}}
    record["of"] = len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    end, worker = time.monotonic() + 60 * options.minutes, None
    for family, class_name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        wanted = family in options.only if options.only else True
        done = record["families"].get(family, {}).get("status") in ("tried", "not built") and not options.again
        if not wanted or done or time.monotonic() > end:
            continue
        if worker is None or not worker.alive:
            worker = Server("families", options.work)
            worker.ask({"family": WARM}, START)  # imports and starts of processes belong to no family
        started = time.monotonic()
        row = worker.ask({"family": family}, LIMIT)
        row |= {"class": class_name, "seconds": round(time.monotonic() - started, 1)}
        record["families"][family] = row
        record |= surroundings()
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{family}: {summary(row)} ({row['seconds']} s)", flush=True)
    if worker is not None:
        worker.close()


def surroundings() -> dict[str, Any]:
    packages = ("ptq-toolkit", "torch", "transformers", "compressed-tensors", "safetensors", "accelerate")
    return {
        "record": "ptq-families",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/quality/families.py WORK -o families.json",
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "model": "random, bfloat16, rounded to 4 bits in groups of 32",
    }


class Server:
    """A process that answers requests, one JSON object per line; killed when it takes too long."""

    def __init__(self, kind: str, work: Path) -> None:
        command = [sys.executable, __file__, str(work), "-o", os.devnull, "--serve", kind]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        end, read = time.monotonic() + limit, b""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        while not read.endswith(b"\n"):
            ready = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0]
            more = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not more:
                self.close()
                return {"status": f"took more than {limit} s" if not ready else "the process died"}
            read += more
        answer: dict[str, Any] = json.loads(read.decode().removeprefix(ANSWER))
        return answer


def serve(work: Path, answer: Any) -> int:
    """Answer requests; what libraries print does not get between the answers."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        out.write(f"{ANSWER}{json.dumps(answer(work=work, **json.loads(line)))}\n")
        out.flush()
    return 0


# -- one family --------------------------------------------------------------------------------------------------------


def one_family(work: Path, family: str) -> dict[str, Any]:
    """Build, quantize twice, load, compare."""
    if family == WARM:
        return start_processes(work)
    folder = work / family
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        model = small_model(family)
        size = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder / "model")
    except Exception as error:  # whatever model code says to small sizes
        return {"status": "not built", "problem": one_line(error)}
    rows = {name: one_scheme(folder, name == "symmetric") for name in ("symmetric", "asymmetric")}
    shutil.rmtree(folder, ignore_errors=True)
    return {"status": "tried", "parameters": size, **rows}


def start_processes(work: Path) -> dict[str, Any]:
    """Two processes without ptq: the one that ptq tries its skeletons in, and ours that loads results."""
    from ptq.proof import settle

    settle.stock_prover = lambda: contextlib.nullcontext(shared("prover", settle.StockProver))
    shared("prover", settle.StockProver).try_to_load(folder="none", loader="AutoModelForCausalLM", tokens=None)
    shared("stock", lambda: Server("stock", work)).ask({"folder": "none"}, START)
    return {"status": "started"}


def small_model(family: str) -> Any:
    """A random model of the family's default config, made small by the names of its entries."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from ptq.proof.shrink import shrink_config

    whole = CONFIG_MAPPING[family]()
    text = whole.get_text_config(decoder=True)
    blocks = next((getattr(text, n) for n in ("num_hidden_layers", "n_layer", "num_layers") if hasattr(text, n)), 2)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ["one"] * blocks
    prefix = min(8, max(2, 1 + max(list(kinds).index(kind) for kind in kinds)))
    problems = []
    for kept in dict.fromkeys((prefix, 2, 4, blocks)):
        try:
            entries = shrink_config(whole.to_dict(), blocks, kept)
            entries |= {key: size for key, size in FILLED.items() if key in entries and entries[key] is None}
            config = type(whole).from_dict(entries | CHANGES.get(family, {}))
            if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
                config.is_decoder = True
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size} parameters")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():  # the default of .02 makes blocks almost transparent
                if parameter.ndim >= 2:
                    parameter.data.mul_(3.0)
            return model.to(torch.bfloat16).eval()
        except Exception as error:  # whatever model code says to these sizes: the next are tried
            problems.append(one_line(error))
    raise ValueError(problems[0])


def one_scheme(folder: Path, symmetric: bool) -> dict[str, Any]:
    import ptq

    out = folder / ("symmetric" if symmetric else "asymmetric")
    try:
        report = ptq.quantize(
            folder / "model", method="rtn", bits=4, group_size=32, symmetric=symmetric, out=out, device="cpu"
        )
    except ptq.PtqError as error:
        return {"status": "refused", "problem": one_line(error)}
    except Exception as error:  # that would be a finding
        return {"status": "failed", "problem": one_line(error)}
    row: dict[str, Any] = {"format": report.container, "reason": report.container_reason, "linears": len(report.layers)}
    try:
        exact, rounded = expected_logits(folder / "model", out)
    except Exception as error:  # the reader does not know such a model, or it cannot be run here
        return row | {"status": "not compared", "problem": one_line(error)}
    row["ptq"] = load_and_compare(out, exact)
    if report.container == "compressed-tensors":
        np.save(out / "expected.npy", rounded)
        row["stock"] = shared("stock", lambda: Server("stock", folder.parent)).ask({"folder": str(out)}, LIMIT)
    good = all(row[reader].get("distance", 1.0) <= MAX_DISTANCE for reader in ("ptq", "stock") if reader in row)
    return row | {"status": "equal" if good else "wrong"}


_SHARED: dict[str, Any] = {}


def shared(name: str, make: Any) -> Any:
    """One process for all families, made when it is first needed."""
    if name not in _SHARED or not getattr(_SHARED[name], "alive", True):
        _SHARED[name] = make()
    return _SHARED[name]


def load_and_compare(folder: Path, expected: Any) -> dict[str, Any]:
    """Load with whatever is imported here, and compare logits in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        missing = sorted(set(info["missing_keys"]) - set(getattr(model, "all_tied_weights_keys", None) or {}))
        run(model)  # the stock quantizer unpacks at the first pass
        torch.nn.Module.float(model)
        distance = float(np.linalg.norm(run(model) - expected) / np.linalg.norm(expected))
    except Exception as error:  # that is what is looked for
        return {"problem": one_line(error)}
    return {"distance": distance} | ({"missing": missing} if missing else {})


class Stock:
    """What a process without ptq answers."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def load(self, work: Path, folder: str) -> dict[str, Any]:
        file = Path(folder) / "expected.npy"
        answer = load_and_compare(Path(folder), np.load(file) if file.exists() else None)
        assert "ptq" not in sys.modules
        return answer


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


if __name__ == "__main__":
    sys.exit(main())
