"""``ptq serve``: an OpenAI-compatible endpoint, by transformers' own server with a packed model in it."""

from __future__ import annotations

from pathlib import Path

import click

from calib.errors import ModelError, UsageError

__all__ = ["command"]


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option("--host", default="localhost", metavar="HOST", help="Address to listen on; 0.0.0.0: every network.")
@click.option("--port", default=8000, type=click.IntRange(1, 65535), metavar="N", help="Port to listen on.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Device to run on.")
@click.option(
    "--dtype",
    default="auto",
    metavar="DTYPE",
    help="Data type of activations and unquantized weights: auto, float32, bfloat16 or float16.",
)
@click.option("--trust-remote-code", is_flag=True, help="Allow running Python code from the model repository.")
def command(model: str, host: str, port: int, device: str, dtype: str, trust_remote_code: bool) -> None:
    """Serve MODEL (a folder or a hub id) through the OpenAI API, until Ctrl-C.

    The server is that of transformers (pip install "ptq-toolkit[serve]"); weights stay packed in it. Endpoints:
    /v1/chat/completions, /v1/completions, /v1/responses, /v1/models.

    \b
    Examples:
      ptq serve OUT
      ptq serve OUT --port 8001
      curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
           -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}'
    """
    from transformers.utils.import_utils import is_serve_available

    from cli.shared.terminal.screen import echo
    from ptq.integration.transformers import register
    from ptq.pipeline.preparation.preflight import resolve_device
    from ptq.recipe import COMPUTE_DTYPES

    if model.endswith(".gguf"):
        raise UsageError(f"{model} is a GGUF file: serve it with llama.cpp's llama-server, or give a model folder.")
    if dtype not in COMPUTE_DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {dtype}.")
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ModelError(f"{model} has no config.json: it is not a model folder.")
    if not is_serve_available():
        raise UsageError('ptq serve needs packages that are not installed: pip install "ptq-toolkit[serve]".')
    from transformers.cli.serve import Serve

    chosen = resolve_device(device)
    register()  # of packed checkpoints, so that the server's from_pretrained keeps them packed
    echo(f"serving {model} on http://{host}:{port}/v1 ({chosen}); Ctrl-C stops", err=True)
    Serve(force_model=model, host=host, port=port, device=str(chosen), dtype=dtype, trust_remote_code=trust_remote_code)
