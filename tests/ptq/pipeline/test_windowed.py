"""Whole runs of methods that learn: what is written is what was learned on; resumed anywhere, the same bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import ptq
from calib.data.tokens import Calibration
from calib.model.structure import find_blocks
from calib.runner.block import BlockContext
from ptq.errors import ModelError, NumericalError, OutputError, UsageError
from ptq.learning.training import WindowRecord, train_window
from ptq.pipeline.events import Event
from ptq.report import Report
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme
from tests.ptq.pipeline.test_distributed import launch
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (8, 12), generator=torch.Generator().manual_seed(3))
CALIBRATION = Calibration(TOKENS, "test", 3, "none")
ACTIVATIONS = {"act_bits": 8, "kv_bits": 8, "symmetric": False}


class Cut(Exception):
    """The accident."""


def run(model: Any, out: Path, **options: Any) -> Report:
    """A few steps a window; ``cut``: raise at the event of that number."""
    cut, seen = options.pop("cut", -1), itertools.count()
    events = options.pop("events", [])

    def listen(event: Event) -> None:
        events.append(event)
        if next(seen) == cut:
            raise Cut

    defaults: dict[str, Any] = {
        "method": "sliderquant-lora", "bits": 3, "group_size": 16, "iters": 4, "batch": 4, "init": "none",
        "calibration": CALIBRATION, "device": "cpu",
    }  # fmt: skip
    return ptq.quantize(model, out=out, on_event=listen, **defaults | options)


def contents(folder: Path) -> dict[str, bytes]:
    """All files that must be the same; the report has seconds in it. Folders are not among them: there are none."""
    assert not [path for path in folder.iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "ptq_report.json"}


def stages(report: Report) -> list[tuple[int, int, float]]:
    return [(row["sweep"], row["window"], row["share"]) for row in report.windows]


def last_hidden(model: Any) -> Tensor:
    """What leaves the last block of a model that runs by itself."""
    found: list[Tensor] = []

    def note(_: object, __: object, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(find_blocks(model)[-1]).register_forward_hook(note)
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    return found[0]


def error_of(model: Any, out: Path) -> float:
    """Of the last hidden state, relative to the full-precision model's."""
    full, own = last_hidden(model), last_hidden(ptq.load(out))
    return float((own - full).square().mean() / full.square().mean())


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the quantized stream holds after every block that it passes, batches joined; the last run's in the end."""
    found: list[Tensor] = []
    close = BlockContext.close

    def closed(context: BlockContext) -> None:
        before = context._closed
        close(context)
        if not before and context.runner.has_tokens:
            found.append(torch.cat([context.runner.hidden(batch, full=False) for batch in context.runner.batches]))

    monkeypatch.setattr(BlockContext, "close", closed)
    return found


# -- what is written is what was learned on ----------------------------------------------------------------------------

HONEST = {"init_data": "training"}  # a start that was fitted to what is held out is hardly beaten on so little data
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama act": ("llama", ACTIVATIONS),
    "llama act sym": ("llama", {"act_bits": 8, "act_symmetric": True, "kv_bits": 6, "kv_symmetric": True, "bits": 4}),
    "qwen2 biases": ("qwen2", ACTIVATIONS),
    "qwen3 norms": ("qwen3", ACTIVATIONS),
    "gpt2 Conv1D": ("gpt2", {"symmetric": False}),
    "gpt2 Conv1D act": ("gpt2", ACTIVATIONS),
    "gemma2": ("gemma2", {"group_size": None}),
    "gemma2 act": ("gemma2", ACTIVATIONS),
    "opt": ("opt", ACTIVATIONS),
    "phi3 fused": ("phi3", {"method": "autoround", "iters": 12}),
    "gpt_neox parallel": ("gpt_neox", {"rounding": "soft", "lr_offset": 0.1}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {"method": "autoround", "symmetric": False, "iters": 12}),
    "gpt_oss": ("gpt_oss", {"method": "sliderquant"}),
    "soft": ("llama", {"rounding": "soft", "lr_offset": 0.1}),
    "offset": ("llama", {"method": "sliderquant"}),
    "intra window": ("llama", {"intra": "window", "group_size": 24}),
    "intra off": ("llama", {"intra": "off", "symmetric": False, "group_size": None}),
    "from gptq": ("qwen2", {"init": "gptq", **HONEST, "method": "sliderquant", "iters": 16, "bits": 2}),
    "mixtral from coreq": ("mixtral", {"init": "coreq", **HONEST, "method": "sliderquant", "iters": 16, "bits": 2}),
    "qwen3_moe from the better": (
        "qwen3_moe",
        {"init": "auto", **HONEST, "method": "autoround", "iters": 16, "bits": 2},
    ),
    "from rtn act": ("llama", {"init": "rtn", "method": "sliderquant", "iters": 16, **ACTIVATIONS}),
    "rotated": ("llama", {"rotate": ("residual", "down"), "act_bits": 8}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_packed_model_computes_what_was_learned_on(name: str, streamed: list[Tensor], tmp_path: Path) -> None:
    family, options = RUNS[name]
    model = tiny_model(family)
    report = run(model, tmp_path / "out", **options)
    packed = ptq.load(tmp_path / "out")
    streams = streamed[-1]
    difference = (last_hidden(packed) - streams).square().mean().sqrt() / streams.square().mean().sqrt()
    assert difference < (2e-3 if "act_bits" in options else 1e-5)  # a token's rounding can fall to the other side
    linears = [name for name, module in packed.named_modules() if isinstance(module, QuantLinear)]
    assert sorted(linears) == sorted(layer.name for layer in report.layers), "every linear is written once"
    assert all(row["loss_after"] <= row["loss_before"] for row in report.windows), "else put back"
    assert any(row["accepted"] for row in report.windows)


@pytest.mark.parametrize("method", ["sliderquant", "sliderquant-lora", "omniquant", "autoround"])
def test_learning_beats_rounding(method: str, tmp_path: Path) -> None:
    model, options = tiny_model("llama"), {"bits": 2, "group_size": 32, "symmetric": False}
    ptq.quantize(model, out=tmp_path / "rtn", method="rtn", scales="minmax", **options)
    rates = {} if method in ("sliderquant", "autoround") else {"lr_clip": 0.1}  # few steps must do
    run(model, tmp_path / "out", method=method, iters=20, **rates, **options)
    assert error_of(model, tmp_path / "out") < 0.8 * error_of(model, tmp_path / "rtn")


@pytest.mark.parametrize("init", ["rtn", "gptq", "coreq"])
def test_learning_goes_on_from_a_starting_point(init: str, tmp_path: Path) -> None:
    model, options = tiny_model("llama"), {"bits": 2, "group_size": 32}
    ptq.quantize(model, out=tmp_path / "start", method=init, calibration=CALIBRATION, **options)
    report = run(model, tmp_path / "out", method="sliderquant", init=init, iters=16, **options)
    assert {share for _, _, share in stages(report)} == {1.0}
    assert {name for row in report.windows for name in row["init"]} == {init}
    before, after = (error_of(model, tmp_path / name) for name in ("start", "out"))
    assert after < (before if init == "rtn" else 1.05 * before)  # hardly to be improved on so little data


def _codes(model: Any) -> list[tuple[str, Tensor]]:
    return [(n, m.quantized().dequantize()) for n, m in model.named_modules() if isinstance(m, QuantLinear)]


# -- windows and stages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, [(0, 0.5), (1, 1.0)]),
        ({"init": "auto"}, [(0, 1.0)]),
        ({"intra": "window", "stages": 3}, [(0, 1 / 3), (0, 2 / 3), (0, 1.0)]),
        ({"intra": "off"}, [(0, 1.0)]),
        ({"intra": "sweep", "stages": 3, "iters": 3}, [(0, 1 / 3), (1, 2 / 3), (2, 1.0)]),
    ],
)
def test_windows_follow_the_schedule_in_every_sweep(
    options: dict[str, Any], shares: list[tuple[int, float]], tmp_path: Path
) -> None:
    events = list[Event]()
    report = run(tiny_model("llama", num_hidden_layers=3), tmp_path / "out", events=events, **options)
    windows = [(0, 1), (0, 2), (1, 3), (2, 3)]
    wanted = {(sweep, number, share) for sweep, share in shares for number in range(4)}
    assert len(report.windows) == len(wanted)
    assert set(stages(report)) == wanted
    for row in report.windows:
        assert (row["start"], row["stop"]) == windows[row["window"]]
    done = [event.done for event in events if event.kind == "block_done"]
    total = next(event.total for event in events if event.kind == "blocks")
    assert done == sorted(done)
    assert done[-1] == total == len(shares) * 6
    assert any(event.text.startswith("4 windows, 6 block visits") for event in events)
    assert any("step" in event.name and "blocks 0 to 1" in event.name for event in events)


def test_a_sweep_goes_on_where_the_last_one_left_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest: dict[int, dict[str, Tensor]] = {}
    met: set[int] = set()

    def watched(window: Any, learners: Any, *args: Any, sweep: int, **options: Any) -> list[WindowRecord]:
        for learner in learners:
            index, state = learner.context.index, learner.state()
            if index in newest:
                assert all(torch.equal(value, newest[index][name]) for name, value in state.items()), (sweep, index)
                met.update({index} if sweep else ())
        records = train_window(window, learners, *args, sweep=sweep, **options)
        newest.update({learner.context.index: learner.state() for learner in learners})
        return records

    monkeypatch.setattr("ptq.pipeline.loops.windowed.train_window", watched)
    run(tiny_model("llama", num_hidden_layers=4), tmp_path / "out", iters=8, intra="sweep")
    assert met == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["slider", "expanding", "contracting", "fixed", "single"])
def test_every_schedule_writes_every_block_once(name: str, tmp_path: Path) -> None:
    report = run(tiny_model("llama", num_hidden_layers=4), tmp_path / "out", schedule=name, intra="off", iters=2)
    names = [layer.name for layer in report.layers]
    assert len(names) == len(set(names)) == 28
    assert len(report.files) == 5  # four blocks, and what lies outside them
    ptq.load(tmp_path / "out")


def test_linears_may_differ_and_blocks_may_stay(tmp_path: Path) -> None:
    model = tiny_model("qwen2", num_hidden_layers=3)
    coarse, fine = Scheme(2, False, 8), Scheme(8, True, None, act_bits=8)
    report = run(
        model,
        tmp_path / "out",
        ignore=("*layers.1.*", "*layers.2.mlp.up_proj"),
        overrides=(("*down_proj", fine), ("*layers.2.*", coarse)),
    )
    found = {layer.name.removeprefix("model.layers."): layer.scheme["bits"] for layer in report.layers}
    assert len(found) == 7 + 6
    assert not any(name.startswith("1.") for name in found)
    assert (found["0.mlp.up_proj"], found["0.mlp.down_proj"], found["2.self_attn.q_proj"]) == (3, 8, 2)
    assert error_of(model, tmp_path / "out") < 1
    assert all(row["steps"] for row in report.windows)


# -- the same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["disk", "memory"])
@pytest.mark.parametrize("options", [{}, {"init": "gptq", "intra": "window", **ACTIVATIONS}], ids=["plain", "much"])
def test_where_activations_are_kept_changes_no_byte(offload: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    run(model, tmp_path / "none", offload="none", **options)
    run(model, tmp_path / "out", offload=offload, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "none")


@pytest.mark.parametrize("method", ["sliderquant", "sliderquant-lora"])
def test_the_seed_decides(method: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run(model, tmp_path / name, method=method, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_the_seed_decides_what_is_drawn_beside_the_order_of_batches(tmp_path: Path) -> None:
    for seed in (5, 6):  # one batch: there is no order
        run(tiny_model("llama"), tmp_path / str(seed), seed=seed, batch=8, lora_rank=8, lr_lora=0.01, clip="off")
    assert contents(tmp_path / "5") != contents(tmp_path / "6")


def test_a_run_leaves_the_model_and_the_random_numbers_of_the_caller_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = last_hidden(model)
    state = torch.get_rng_state()
    run(model, tmp_path / "out", **ACTIVATIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(last_hidden(model), logits), "no mark and no hook is left behind"


# -- resume ------------------------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "sweeps": {"kv_bits": 4, "act_bits": 6, "init": "gptq", "intra": "sweep"},
    "soft": {"rounding": "soft", "lr_offset": 0.1, "blocks": 3},
    "single": {"method": "autoround", "symmetric": False, "init": "auto", "blocks": 3},
    "window": {"intra": "window", "kv_bits": 4},
    "mixture": {"family": "qwen3_moe", "method": "sliderquant", "init": "auto"},
    "scaled": {"family": "gpt2", "act_bits": 6},
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, list[Event]]]:
    """For every setting the model's folder, an uninterrupted run's output, and its events."""
    found = {}
    for name, options in RESUMED.items():
        folder = tmp_path_factory.mktemp("resumed")
        events = list[Event]()
        model = tiny_model(options.get("family", "llama"), num_hidden_layers=options.get("blocks", 2))
        model.save_pretrained(folder / "model")
        resume(folder / "model", folder / "whole", name, events=events)
        found[name] = folder / "model", folder / "whole", events
    return found


def resume(model: Path, out: Path, name: str, **more: Any) -> Report:
    options = {key: value for key, value in RESUMED[name].items() if key not in ("family", "blocks")}
    return run(model, out, **options | more)


def boundaries(events: list[Event]) -> list[int]:
    """Numbers of the events that end something: a block, a window, a linear of the starting point, a window's steps."""
    ends = ("block_done", "layer_done")
    steps = [n for n, event in enumerate(events) if event.kind == "layer" and "step" in event.name]
    return sorted([n for n, event in enumerate(events) if event.kind in ends] + steps)


@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("name", RESUMED)
def test_cut_anywhere_and_resumed_gives_the_same_bytes(
    name: str, part: int, wholes: dict[str, tuple[Path, Path, list[Event]]], tmp_path: Path
) -> None:
    """Every sixth boundary, each cut in a run of its own."""
    model, whole, events = wholes[name]
    cuts = [cut for cut in boundaries(events) if events[cut].kind != "layer_done" or cut % 5 == 0]
    for cut in cuts[part::6]:
        out = tmp_path / str(cut)
        with pytest.raises(Cut):
            resume(model, out, name, cut=cut)
        assert not (out / "config.json").exists()
        report = resume(model, out, name)
        assert contents(out) == contents(whole), events[cut]
        first = Report.load(whole)
        assert set(stages(report)) == set(stages(first))
        assert len(report.windows) == len(first.windows)
        assert report.files == first.files
        assert [layer.name for layer in report.layers] == [layer.name for layer in first.layers]


def test_cut_again_and_again(wholes: dict[str, tuple[Path, Path, list[Event]]], tmp_path: Path) -> None:
    model, whole, _ = wholes["sweeps"]
    for cut in (9, 20, 6, 8, 9, 8, 9):
        with pytest.raises(Cut):
            resume(model, tmp_path / "out", "sweeps", cut=cut)
    resume(model, tmp_path / "out", "sweeps")
    assert contents(tmp_path / "out") == contents(whole)


def test_what_is_finished_is_not_learned_again(
    wholes: dict[str, tuple[Path, Path, list[Event]]], tmp_path: Path
) -> None:
    model, _, events = wholes["window"]
    windows = [event.name for event in events if event.kind == "layer"]
    last = max(n for n, event in enumerate(events) if event.kind == "layer")
    with pytest.raises(Cut):
        resume(model, tmp_path / "out", "window", cut=last)
    again = list[Event]()
    resume(model, tmp_path / "out", "window", events=again)
    names = [event.name for event in again if event.kind == "layer"]
    assert 0 < len(names) < len(windows)
    assert {name.split(",")[0] for name in names} == {windows[-1].split(",")[0]}
    assert [event.done for event in again if event.kind == "block_done"][-1] == 8


def test_a_starting_point_is_not_made_again(wholes: dict[str, tuple[Path, Path, list[Event]]], tmp_path: Path) -> None:
    model, _, events = wholes["sweeps"]
    first = next(n for n, event in enumerate(events) if event.kind == "block_done")
    for cut, linears in ((first, 7), (boundaries(events)[-3], 0)):
        with pytest.raises(Cut):
            resume(model, tmp_path / str(cut), "sweeps", cut=cut)
        again = list[Event]()
        resume(model, tmp_path / str(cut), "sweeps", events=again)
        assert sum(event.kind == "layer_done" for event in again) == linears


def test_other_settings_are_refused_and_restart_helps(
    wholes: dict[str, tuple[Path, Path, list[Event]]], tmp_path: Path
) -> None:
    model, whole, events = wholes["window"]
    with pytest.raises(Cut):
        resume(model, tmp_path / "out", "window", cut=boundaries(events)[2], iters=8)
    with pytest.raises(OutputError, match=r"recipe\.options\.iters was 8 and is now 4.*--restart"):
        resume(model, tmp_path / "out", "window")
    resume(model, tmp_path / "out", "window", restart=True)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_damaged_state_is_named_and_restart_helps(
    wholes: dict[str, tuple[Path, Path, list[Event]]], tmp_path: Path
) -> None:
    model, whole, events = wholes["window"]
    steps = [(n, event.name.split(",")[0]) for n, event in enumerate(events) if event.kind == "layer"]
    with pytest.raises(Cut):  # in the second window: the first one's state is on disk
        resume(model, tmp_path / "out", "window", cut=next(n for n, window in steps if window != steps[0][1]))
    (state,) = (tmp_path / "out" / ".ptq_partial" / "work").glob("state-*")
    state.write_bytes(state.read_bytes()[:-7])
    with pytest.raises(OutputError, match=state.name):
        resume(model, tmp_path / "out", "window")
    resume(model, tmp_path / "out", "window", restart=True)
    assert contents(tmp_path / "out") == contents(whole)


def test_warnings_of_a_resumed_run_are_those_of_a_whole_one(
    wholes: dict[str, tuple[Path, Path, list[Event]]], tmp_path: Path
) -> None:
    model, whole, events = wholes["scaled"]
    warnings = Report.load(whole).warnings
    assert any("channels are not scaled" in text for text in warnings), "gpt2's c_proj has an activation before it"
    for number, cut in enumerate(boundaries(events)[5::4]):
        with pytest.raises(Cut):
            resume(model, tmp_path / str(number), "scaled", cut=cut)
        assert resume(model, tmp_path / str(number), "scaled").warnings == warnings


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> list[str]:
    folder = tmp_path_factory.mktemp("processes")
    tiny_model("llama", vocab_size=len(tiny_tokenizer)).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join(str(n * n * 7919) for n in range(3000)))  # batches differ
    return [
        *("quantize", str(folder / "model"), "--group-size", "16", "--device", "cpu"),
        *("--calib", str(folder / "text.txt"), "--calib-seqlen", "12"),
    ]


@pytest.mark.parametrize(
    ("method", "init"), [("sliderquant-lora", "none"), ("autoround", "none"), ("autoround", "rtn")]
)
def test_two_processes_learn_like_one(method: str, init: str, command: list[str], tmp_path: Path) -> None:
    """With half the batch each and all batches in every step, the gradients are those of one process; rates that do not
    fall make the best step one in the middle, which must be the same on both."""
    command = [
        *command,
        "--method",
        method,
        "--init",
        init,
        "--iters",
        "12",
        "--calib-samples",
        "16",
        "-O",
        "decay=constant",
    ]
    for count, batch in ((1, 16), (2, 8)):
        results = launch(count, [*command, "--train-batch", str(batch), "-o", str(tmp_path / str(count))], tmp_path)
        assert [result.code for result in results] == [0] * count, results[0].error
    one, two = (Report.load(tmp_path / str(count)) for count in (1, 2))
    assert stages(one) == stages(two)
    assert any(row["loss_after"] < row["loss_before"] for row in two.windows)
    for ours, alone in zip(two.windows, one.windows, strict=True):
        assert ours["loss_after"] == pytest.approx(alone["loss_after"], rel=1e-3)
    pairs = zip(_codes(ptq.load(tmp_path / "1")), _codes(ptq.load(tmp_path / "2")), strict=True)
    for (name, alone_weight), (_, weight) in pairs:
        assert ((weight - alone_weight).abs() < 1e-4).float().mean() > 0.99, name


def test_processes_with_different_numbers_of_batches_finish(command: list[str], tmp_path: Path) -> None:
    """Three batches for two processes; an epoch is as long as the longer part."""
    command = [*command, "--method", "sliderquant-lora", "--init", "none", "--epochs", "2", "--calib-samples", "12"]
    command += ["--train-batch", "4"]
    results = launch(2, [*command, "-o", str(tmp_path / "out")], tmp_path)
    assert [result.code for result in results] == [0, 0], results[0].error
    report = Report.load(tmp_path / "out")
    assert {row["steps"] for row in report.windows} == {2}
    assert all(row["loss_after"] <= row["loss_before"] for row in report.windows), "else put back"


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 3}, r"window of 3 blocks does not fit a model of 2: .*size is 1 to 2"),
        ({"step": 3}, r"step is 1 to 2"),
        ({"lora_rank": 4000}, r"--lora-rank 4000 is above the widest linear's \d+ input channels"),
        ({"batch": 9}, r"8 calibration sequences are fewer than the 9 of a batch.*batch 8"),
        ({"epochs": -1}, r"epochs is a whole number from 0"),
        ({"lora_rank": 9999}, r"lora_rank is a whole number from 0 to 4096"),
        ({"schedule": "sliding"}, r"unknown schedule 'sliding'.*slider"),
        ({"act_bits": 9}, r"act_bits must be a whole number from 2 to 8"),
        ({"lora_rank": 0, "clip": "off", "scaling": "auto"}, r"nothing is left to learn"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        run(tiny_model("llama"), tmp_path / "out", **options)


def test_scaling_that_a_block_forbids_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(UsageError, match=r"h\.0: .*mlp\.c_proj.*scaling=auto"):
        run(model, tmp_path / "out", act_bits=8, scaling="on")
    run(model, tmp_path / "auto", act_bits=8, scaling="auto", iters=2)


def test_keys_and_values_that_cannot_be_reached_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Leave out --kv-bits"):
        run(tiny_model("falcon"), tmp_path / "out", kv_bits=4)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj: .* are NaN or Inf"):
        run(model, tmp_path / "out")
