"""Which linear gets how many bits: KL and perplexity of allocations at equal real bytes.

    python benchmarks/quality/allocation.py MODEL OUT --calib TEXT --text TEXT
    python benchmarks/quality/allocation.py MODEL OUT --only coreq --rows 'coreq-3.0-*-seed0'
    python benchmarks/quality/allocation.py MODEL OUT --tiny        # a few tokens, to try the program itself

Every row is a JSON file in OUT, written when it is there, so that an interrupted run goes on. The most important rows
come first (``--only`` takes parts in this order, ``--rows`` those whose name matches a pattern):

    itq      3.15 bits with itq3s among the candidates under CoreQ, beside itq3s for all, three calibration seeds
    coreq    4.0, 3.5, 3.0 bits under CoreQ: uniform, fisher, hawq, three calibration seeds
    blocks   how many blocks may drop to the lower level at 5 % loss of perplexity, by order
    refine   fisher at 3.5, 3.0 and 2.5 bits under nearest rounding, before and after rounds of refinement
    rtn      4.0, 3.5, 3.0 bits (those of uniform codes in groups of 64, scales and zero points included): uniform,
             LIM, ZD, five random orders of blocks, hawq, fisher, ModelOpt's score, kl; 3.15 bits with itq3s
    cost     seconds of scoring beside those of plain forward and backward passes
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptq
from calib.checkpoint.atomic_files import write_json
from calib.precision import has_fast_bfloat16
from ptq.allocation import Plan, Planner, PlanOptions, make_planner
from ptq.allocation.measure import token_kl
from ptq.allocation.problem.budget import Budget
from ptq.allocation.problem.candidates import Candidate, rounding_errors

LEVELS = (4.0, 3.5, 3.0)
WIDE = "2,3,4,5,6,8"
UNIFORM = {4.0: "4", 3.5: "3g24", 3.0: "3"}  # smaller groups spend the half bit on scales, as far as groups allow
RANKINGS = ("lim", "zd", *(f"random-{seed}" for seed in range(5)))
TABLES = ("fisher", "hawq", "modelopt", "kl")
ITQ = "itq3s,2,3,4,5,6,8"
BEST = {"beam": 4, "cd_passes": 2}  # CoreQ's slower options, for the row that goes for quality
LOSS = 0.05  # of perplexity, at which a block order is through


class Bench:
    """The model, its held-out tokens, planners by score, and the folder of rows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, Path(arguments.out)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if has_fast_bfloat16(self.device) and self.device.type == "cuda" else torch.float32
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(self.device).eval()
        self.base = ptq.Scheme(bits=4, symmetric=False, group_size=64).resolved(torch.bfloat16)
        tokens = ptq.load_calibration(
            arguments.text, tokenizer, samples=arguments.eval_samples, seqlen=arguments.eval_seqlen, seed=1
        ).tokens
        self.tokens = tokens.to(self.device)
        self.planners: dict[tuple[str, str], Planner] = {}
        self.seconds: dict[str, float] = {}
        self._originals: dict[str, Tensor] = {}
        self._rounded: dict[tuple[str, str], Tensor] = {}

    # -- rows --------------------------------------------------------------------------------------------------------

    def row(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A row, from its file where it is there; nothing where it is not asked for."""
        if not fnmatch.fnmatchcase(name, self.arguments.rows):
            return {}
        file = self.out / f"{name}.json"
        if file.is_file():
            return dict(json.loads(file.read_text()))
        start = time.perf_counter()
        row = {"row": name, **make(), "seconds": round(time.perf_counter() - start, 2)}
        write_json(file, row)
        print(json.dumps(row), flush=True)
        return row

    def planner(self, score: str, candidates: str) -> Planner:
        """A planner with its scores, which are kept in the folder."""
        name, _, seed = score.partition("-")
        key = (score, candidates)
        if key not in self.planners:
            a = self.arguments
            seeded = int(seed) if name == "random" else 0
            text = ptq.CalibrationSpec(a.calib, a.samples, a.seqlen, seeded)
            options = PlanOptions(candidates, self.base, name, calibration=text)
            planner = make_planner(a.model, options, device=self.device.type, cache=self.out / "cache")
            start = time.perf_counter()
            planner.score()
            self.seconds[score] = time.perf_counter() - start
            self.planners[key] = planner
        return self.planners[key]

    # -- measuring ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, other: Any) -> dict[str, float]:
        """KL per token and perplexity on the held-out tokens, with the standard error over sequences."""
        kls, losses = [], []
        for row in self.tokens:
            full = self.full_logits(row)
            logits = other(input_ids=row[None]).logits[0].float()
            kls.append(float(token_kl(full, logits).double().mean()))
            losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], row[1:])))
        kl, loss = torch.tensor(kls), torch.tensor(losses)
        error = float(kl.std()) / len(kl) ** 0.5 if len(kl) > 1 else float("nan")
        return {
            "kl": float(kl.mean()),
            "kl_se": error,
            "perplexity": float(loss.mean().exp()),
            "tokens": self.tokens.numel(),
        }

    def full_logits(self, row: Tensor) -> Tensor:
        """Logits of the model as it is in the folder."""
        with self.weights({}):
            logits: Tensor = self.model(input_ids=row[None]).logits[0].float()
        return logits

    def weights(self, chosen: Mapping[str, Candidate]) -> Weights:
        """Inside, the model's linears are rounded to these formats, and all others as they are."""
        return Weights(self, chosen)

    def rounded(self, name: str, candidate: Candidate) -> Tensor:
        """A weight in a format, rounded once."""
        key = (name, candidate.label)
        if key not in self._rounded:
            weight = self.original(name).float()
            (error,) = rounding_errors(weight, (candidate,))
            self._rounded[key] = (weight + error).to(self.model.dtype)
        return self._rounded[key]

    def original(self, name: str) -> Tensor:
        """The checkpoint's weight of a linear."""
        if name not in self._originals:
            self._originals[name] = self.model.get_submodule(name).weight.data
        return self._originals[name]


class Weights:
    """A context in which a `Bench`'s model has rounded linears; contexts may be nested, the innermost holds."""

    def __init__(self, bench: Bench, chosen: Mapping[str, Candidate]) -> None:
        self._bench, self._chosen = bench, chosen
        self._before: dict[str, Tensor] = {}

    def __enter__(self) -> Weights:
        bench = self._bench
        for name in {*self._chosen, *bench._originals}:
            module = bench.model.get_submodule(name)
            bench.original(name)
            self._before[name] = module.weight.data
            candidate = self._chosen.get(name)
            rounded = candidate is not None and candidate.scheme is not None
            module.weight.data = bench.rounded(name, candidate) if rounded and candidate else bench.original(name)
        return self

    def __exit__(self, *_: object) -> None:
        for name, weight in self._before.items():
            self._bench.model.get_submodule(name).weight.data = weight


def real_bits(bench: Bench, level: float) -> float:
    """Real bits per weight of codes of so many bits in the base's groups; between two widths their mean."""
    linears = bench.planner("uniform", WIDE).table
    whole = {c.bits: float(linears.bits[:, i].sum() / linears.sizes.sum()) for i, c in enumerate(linears.candidates)}
    return (whole[int(level)] + whole[int(level + 0.5)]) / 2


def allocate(bench: Bench, score: str, candidates: str, target: float) -> tuple[Planner, Any, dict[str, Any]]:
    """A planner, its allocation, and what a row says of it."""
    planner = bench.planner(score, candidates)
    allocation = planner.allocate(Budget(bpw=target))
    about = planner.plan(allocation, {"bpw": target}).about
    keys = ("bits_per_weight", "file_bytes", "predicted_kl", "candidates")
    return planner, allocation, {key: about[key] for key in keys if key in about}


def rtn_row(bench: Bench, score: str, candidates: str, target: float) -> dict[str, Any]:
    """One allocation under nearest rounding."""
    planner, allocation, about = allocate(bench, score, candidates, target)
    with bench.weights(planner.candidates_of(allocation)):
        return {"score": score, "target": target, **about, **bench.measure(bench.model)}


def rtn_rows(bench: Bench) -> None:
    """The table of allocations under nearest rounding."""
    for level in LEVELS:
        target, uniform = real_bits(bench, level), UNIFORM[level]
        bench.row(f"rtn-{level}-uniform", lambda u=uniform: rtn_row(bench, "uniform", u, cost_of(bench, u)))
        for score in TABLES:
            bench.row(f"rtn-{level}-{score}", lambda s=score, t=target: rtn_row(bench, s, WIDE, t))
        pair = {4.0: "3,5", 3.5: "3,4", 3.0: "2,4"}[level]
        for score in RANKINGS:
            bench.row(f"rtn-{level}-{score}", lambda s=score, t=target, p=pair: rtn_row(bench, s, p, t))
    for score in ("fisher", "kl"):
        bench.row(f"rtn-3.15-itq3s-{score}", lambda s=score: rtn_row(bench, s, ITQ, 3.15))


def cost_of(bench: Bench, candidate: str) -> float:
    """Real bits per weight of one format for all."""
    table = bench.planner("uniform", candidate).table
    return float(table.bits[:, 0].sum() / table.sizes.sum())


def itq_rows(bench: Bench) -> None:
    """The rotated 3-bit format among the candidates under CoreQ, beside the same format for all."""
    for seed in range(bench.arguments.seeds):
        for options, mark in ((BEST, "-best"), ({}, "")):
            for score, names in (("fisher", ITQ), ("uniform", "itq3s"), ("hawq", ITQ)):
                target = cost_of(bench, names) if score == "uniform" else 3.15
                bench.row(
                    f"coreq{mark}-3.15-itq3s-{score}-seed{seed}",
                    lambda s=score, n=names, t=target, d=seed, o=options: coreq_row(bench, s, n, t, d, o),
                )


def coreq_rows(bench: Bench) -> None:
    """The best two and uniform under CoreQ, by seed of the calibration."""
    for seed in range(bench.arguments.seeds):
        for level in reversed(LEVELS):
            for score, names in (("uniform", UNIFORM[level]), ("fisher", WIDE), ("hawq", WIDE)):
                target = cost_of(bench, names) if score == "uniform" else real_bits(bench, level)
                bench.row(
                    f"coreq-{level}-{score}-seed{seed}",
                    lambda s=score, n=names, t=target, d=seed: coreq_row(bench, s, n, t, d),
                )


def coreq_row(
    bench: Bench, score: str, candidates: str, target: float, seed: int, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One allocation under CoreQ."""
    a = bench.arguments
    planner, allocation, about = allocate(bench, score, candidates, target)
    plan: Plan = planner.plan(allocation, {"bpw": target})
    text = ptq.CalibrationSpec(a.calib, a.coreq_samples, a.seqlen, seed)
    recipe = dataclasses.replace(
        plan.recipe(ptq.Recipe(method="coreq", options=options or {}, calibration=text)), container="native"
    )
    folder = bench.out / "work"
    shutil.rmtree(folder, ignore_errors=True)
    report = ptq.quantize(a.model, recipe, out=folder, device=bench.device.type)
    packed: Any = ptq.load(folder, dtype=bench.model.dtype).to(bench.device).eval()
    measured = bench.measure(packed)
    shutil.rmtree(folder, ignore_errors=True)
    real = report.totals["bits_per_weight"]
    return {"score": score, "target": target, "seed": seed, **about, "written_bits_per_weight": real, **measured}


def refine_rows(bench: Bench) -> None:
    """What measuring again in the mixed model is worth, under nearest rounding."""
    for level in (3.0, 2.5, 3.5):
        bench.row(f"refine-{level}", lambda v=level: refine_row(bench, real_bits(bench, v)))


def refine_row(bench: Bench, target: float) -> dict[str, Any]:
    """KL before refinement and after, with what each round did."""
    planner, before, about = allocate(bench, "fisher", WIDE, target)
    with bench.weights(planner.candidates_of(before)):
        first = bench.measure(bench.model)
    planner.notes = []
    _, after = planner.planned(Budget(bpw=target), check=False, rounds=bench.arguments.rounds)
    with bench.weights(planner.candidates_of(after)):
        last = bench.measure(bench.model)
    return {"target": target, **about, "before": first, "after": last, "rounds": planner.notes}


def block_rows(bench: Bench) -> None:
    """How far orders of blocks go before perplexity has grown by `LOSS`."""
    for high, low in ((8, 4), (4, 3), (4, 2)):
        for score in RANKINGS:
            bench.row(f"blocks-{high}-{low}-{score}", lambda s=score, p=(low, high): block_row(bench, s, p))


def block_row(bench: Bench, score: str, pair: tuple[int, int]) -> dict[str, Any]:
    """The largest fraction of blocks at the lower level, and the curve up to it."""
    planner = bench.planner(score, f"{pair[0]},{pair[1]}")
    total = len({one.name.split(".")[2] for one in planner.setting.linears})
    curve = []
    for dropped in range(0, total + 1, max(1, total // bench.arguments.block_steps)):
        allocation = planner.allocate(Budget(fraction=1 - dropped / total))
        with bench.weights(planner.candidates_of(allocation)):
            curve.append((dropped / total, bench.measure(bench.model)["perplexity"]))
        if curve[-1][1] > (1 + LOSS) * curve[0][1]:
            break
    kept = [fraction for fraction, perplexity in curve if perplexity <= (1 + LOSS) * curve[0][1]]
    return {"score": score, "high": pair[1], "low": pair[0], "fraction": kept[-1], "curve": curve}


def cost_row(bench: Bench) -> dict[str, Any]:
    """Seconds of scoring beside plain passes over the same tokens."""
    a = bench.arguments
    tokens = torch.randint(0, 1000, (a.samples, a.seqlen), device=bench.device)
    for warm in (tokens[:1], tokens):
        start = time.perf_counter()
        for row in warm:
            bench.model.zero_grad()
            logits = bench.model(input_ids=row[None]).logits[0]
            torch.nn.functional.cross_entropy(logits[:-1].float(), row[1:]).backward()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
    plain = time.perf_counter() - start
    bench.model.zero_grad()
    planner = bench.planner("fisher", WIDE)
    start = time.perf_counter()
    planner.allocate(Budget(bpw=real_bits(bench, 3.5)))
    solved = time.perf_counter() - start
    return {"plain_forward_backward_seconds": plain, "score_seconds": bench.seconds, "solve_seconds": solved}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--calib", default="pydoc")
    parser.add_argument("--text", default="pydoc:eval")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--coreq-samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--block-steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="of refinement, at most")
    parser.add_argument("--only", default="itq,coreq,blocks,refine,rtn,cost")
    parser.add_argument("--rows", default="*", help="only rows whose name matches this pattern")
    parser.add_argument("--tiny", action="store_true", help="a few tokens of everything, to try the program itself")
    found = parser.parse_args()
    if found.tiny:
        sizes = {"samples": 2, "seqlen": 64, "eval_samples": 2, "eval_seqlen": 64, "coreq_samples": 4, "seeds": 1}
        vars(found).update(sizes, block_steps=3)
    return found


def parts(bench: Bench) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is measured, in the order of importance."""
    yield "itq", lambda: itq_rows(bench)
    yield "coreq", lambda: coreq_rows(bench)
    yield "blocks", lambda: block_rows(bench)
    yield "refine", lambda: refine_rows(bench)
    yield "rtn", lambda: rtn_rows(bench)
    yield "cost", lambda: bench.row("cost", lambda: cost_row(bench))


def main() -> None:
    given = arguments()
    bench = Bench(given)
    bench.out.mkdir(parents=True, exist_ok=True)
    for name, run in parts(bench):
        if name in given.only.split(","):
            run()


if __name__ == "__main__":
    main()
