"""``ptq bench``: how fast this machine runs packed weights."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
from typing import TYPE_CHECKING, Any

import click

from calib.errors import UsageError

if TYPE_CHECKING:
    from ptq.runtime.benchmark import KernelTiming

__all__ = ["command"]

_SHAPES = "576x1536,4096x4096"
_DEVICE = click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Device to measure.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on stdout (docs/json.md).")


@click.group()
def command() -> None:
    """Measure how fast this machine runs packed weights.

    \b
    Examples:
      ptq bench kernels
      ptq bench kernels --shape 8192x28672 --batch 1,8,64 --format int4,itq3s
      ptq bench generate OUT --against MODEL

    Both commands take --json.
    """


@command.command("kernels", context_settings={"show_default": True})
@click.option("--shape", default=_SHAPES, metavar="ROWSxCOLUMNS", help="Shapes of weights, with commas.")
@click.option("--batch", default="1", metavar="N", help="Numbers of vectors multiplied at once, with commas.")
@click.option(
    "--format",
    "formats",
    default="int3,int4,itq3s",
    metavar="NAMES",
    help="With commas: int4, int3g64, int4g32asym (group 128 and symmetric if not said) or a number format.",
)
@_DEVICE
@_JSON
def kernels(shape: str, batch: str, formats: str, device: str, as_json: bool) -> None:
    """Time products with packed weights beside bfloat16, and against the machine's copy bandwidth.

    \b
    Examples:
      ptq bench kernels
      ptq bench kernels --shape 8192x28672 --batch 1,8,64 --format int4,itq3s
      PTQ_KERNEL=reference ptq bench kernels --format int3g64asym --json
    """
    from cli.shared.terminal.screen import echo
    from ptq.pipeline.preparation.preflight import resolve_device
    from ptq.runtime.benchmark import copy_bandwidth, parse_format, time_formats

    shapes = [_shape(text) for text in shape.split(",")]
    batches = [_whole(text, "--batch") for text in batch.split(",")]
    schemes = [parse_format(name.strip()) for name in formats.split(",")]
    where = resolve_device(device)
    copied = copy_bandwidth(where)
    timings = [row for one in shapes for row in time_formats(schemes, one, batches, where, copied)]
    if as_json:
        rows = [timing.record() for timing in timings]
        echo(json.dumps({"device": _name(where), "copy_bytes_per_second": copied, "kernels": rows}))
        return
    _show(timings, f"{_name(where)}, copies {copied / 1e9:.1f} GB/s (read and written)")


@command.command("generate", context_settings={"show_default": True})
@click.argument("model")
@click.option("--against", metavar="MODEL", help="Another model for comparison, e.g. the one in full precision.")
@click.option("--prompt-tokens", default=128, type=click.IntRange(min=1), metavar="N", help="Length of the prompt.")
@click.option("--new-tokens", default=64, type=click.IntRange(min=2), metavar="N", help="Tokens to write.")
@_DEVICE
@click.option(
    "--dtype",
    default="auto",
    metavar="DTYPE",
    help="Type of activations and of what is not quantized: auto, float32, ...",
)
@click.option("--compile", "compiled", is_flag=True, help="On a GPU compile the step first (torch.compile, a minute).")
@click.option("--trust-remote-code", is_flag=True, help="Allow running Python code from the model repository.")
@_JSON
def generate(
    model: str,
    against: str | None,
    prompt_tokens: int,
    new_tokens: int,
    device: str,
    dtype: str,
    compiled: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Time how fast MODEL writes: tokens per second, time to the first token, memory.

    Steps run as in ptq generate: on a GPU with a static cache and a captured graph, for both models.

    \b
    Examples:
      ptq bench generate OUT
      ptq bench generate OUT --against MODEL --prompt-tokens 512
    """
    from cli.shared.models import load_model
    from cli.shared.terminal.screen import echo
    from evals.inference.speed import measure_generation
    from ptq.runtime.chosen import kernel_line

    rows: list[dict[str, Any]] = []
    for source in (model, against):
        if source is None:
            continue
        loaded = load_model(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        line = kernel_line(loaded.model)
        if line is not None:
            echo(f"{source}: {line}", err=True)
        speed = measure_generation(loaded.model, prompt_tokens, new_tokens, compiled=compiled)
        if speed.eager_reason is not None:
            echo(f"{source}: steps are not replayed from a CUDA graph: {speed.eager_reason}", err=True)
        rows.append({"model": source, "dtype": str(loaded.model.dtype)[6:], **dataclasses.asdict(speed)})
        del loaded
        gc.collect()
    if as_json:
        echo(json.dumps({"models": rows}))
        return
    _show_speeds(rows)


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)
    if match is None or 0 in (int(match[1]), int(match[2])):
        raise UsageError(f"--shape takes rows x columns such as 4096x4096, got {text!r}.")
    return int(match[1]), int(match[2])


def _whole(text: str, option: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise UsageError(f"{option} takes whole numbers from 1 on, with commas; got {text!r}.")
    return int(text)


def _name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _show(timings: list[KernelTiming], title: str) -> None:
    from rich.table import Table

    from cli.shared.terminal.screen import console

    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for heading in ("shape", "format", "kernel"):
        table.add_column(heading, no_wrap=True)
    for heading in ("batch", "us", "bf16 us", "times bf16", "% of copies"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in timings:
        figures = (row.seconds * 1e6, row.dense_seconds * 1e6, row.speedup, 100 * row.bandwidth_share)
        shape = f"{row.shape[0]}x{row.shape[1]}"
        table.add_row(shape, row.format, row.kernel, str(row.batch), *(f"{figure:.4g}" for figure in figures))
    console().print(table)


def _show_speeds(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from cli.shared.tables import size
    from cli.shared.terminal.screen import console

    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for heading in ("tokens/s", "first token s", "weights", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        speeds = (f"{row['tokens_per_second']:.1f}", f"{row['first_token_seconds']:.3g}")
        table.add_row(row["model"], *speeds, size(row["weight_bytes"]), size(row["peak_bytes"]))
    console().print(table)
