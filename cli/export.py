"""``ptq export``: a finished result in the format of another runtime."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.command()
@click.argument("result", metavar="OUT")
@click.option(
    "--format",
    required=True,
    metavar="NAME",
    help="compressed-tensors, gptq, awq, native, gguf, or dequantized: bf16, f16, f32.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The new folder, or the .gguf file.")
@click.option(
    "--embedding",
    default="auto",
    show_default=True,
    metavar="TYPE",
    help="Of a .gguf file, the type of embedding and head: auto, q6_k, q8_0, keep.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of ptq there.")
@click.option("--trust-remote-code", is_flag=True, help="Allow running Python code from the model repository.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout (docs/json.md).")
def command(
    result: str, format: str, out: Path, embedding: str, overwrite: bool, trust_remote_code: bool, as_json: bool
) -> None:
    """Write OUT, a folder of ptq quantize, in the format of another runtime.

    OUT may also be a GPTQ, AWQ or compressed-tensors folder of another program, or for bf16, f16 and f32 a .gguf file.

    Weights are never rounded again: a format that cannot hold them exactly is refused.

    \b
    Examples:
      ptq export OUT --format gptq -o OUT-gptq
      ptq export OUT --format bf16 -o OUT-bf16
      ptq export OUT --format gguf -o OUT.gguf
    """
    from cli.shared.tables import size
    from cli.shared.terminal.progress import ProgressListener
    from cli.shared.terminal.screen import console, echo
    from ptq.export import export

    with ProgressListener(console(stderr=True)) as listener:
        report = export(
            result,
            format=format,
            out=out,
            overwrite=overwrite,
            embedding=embedding,
            trust_remote_code=trust_remote_code,
            on_event=listener,
        )
    if as_json:
        echo(report.to_json(), newline=False)
    else:
        echo(f"{report.container}: {size(report.totals['file_bytes'])} of weights written to {out}")
