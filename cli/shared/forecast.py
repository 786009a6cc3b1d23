"""A `ptq.Forecast` as a table: what ``ptq quantize --dry-run`` shows."""

from __future__ import annotations

from rich.table import Table

from cli.shared.tables import kept_table, size
from cli.shared.terminal.progress import duration
from cli.shared.terminal.screen import Screen
from ptq.pipeline.dry_run.forecast import Forecast

__all__ = ["show_forecast"]


def show_forecast(forecast: Forecast, screen: Screen) -> None:
    """Sizes, time, memory, and what stays in full precision."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, text in _rows(forecast):
        table.add_row(label, text)
    screen.print(table)
    if forecast.kept:
        screen.print("", kept_table(forecast.kept, forecast.payload_bytes + forecast.kept_bytes))
    for warning in forecast.warnings:
        screen.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def _rows(forecast: Forecast) -> list[tuple[str, str]]:
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in forecast.timing.items())
    rows = [
        ("model", f"{forecast.model} ({forecast.architecture})"),
        ("container", f"{forecast.container}: {forecast.container_reason}"),
        (
            "quantized",
            f"{forecast.linears} linears in {forecast.blocks} blocks, {forecast.quantized_parameters:,} weights",
        ),
        ("bits per weight", f"{forecast.bits_per_weight:.3f}"),
        ("weights", f"{size(forecast.source_bytes)} -> {size(forecast.file_bytes)} ({size(forecast.free_disk)} free)"),
        ("time", f"about {duration(forecast.seconds)} ({parts})"),
        ("peak memory", f"about {size(forecast.peak_memory)} ({size(forecast.free_memory)} free now)"),
    ]
    if forecast.peak_device is not None and forecast.free_device is not None:
        rows.append(("peak GPU memory", f"about {size(forecast.peak_device)} ({size(forecast.free_device)} free now)"))
    if forecast.calibration is not None:
        c = forecast.calibration
        where = {"none": "on the device", "memory": "in memory", "disk": "on disk"}[forecast.offload]
        how = "each block is run once" if forecast.lockstep else "blocks are run again for every input group"
        rows.append(("calibration", f"{c['sequences']} x {c['seqlen']} tokens in {c['batches']} batches"))
        rows.append(("activations", f"{where}; {how}"))
    if forecast.learning is not None:
        found = forecast.learning
        rows.append(("windows", found["schedule"]))
        rows.append(
            ("learning", f"{found['steps']} steps per stage of a window, {found['visits']} block visits in all")
        )
    rows += [("one kernel" if i == 0 else "", ", ".join(names)) for i, names in enumerate(forecast.shared)]
    return rows
