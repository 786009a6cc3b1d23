"""``ptq tune``: norms of a finished result, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import click

__all__ = ["command"]


@click.command(context_settings={"show_default": True})
@click.argument("result", metavar="OUT")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The new folder.")
@click.option("--reference", metavar="MODEL", help="The full-precision model.  [default: the one that OUT was made of]")
@click.option("--calib", default="c4", metavar="SOURCE", help="Text to learn from, as in ptq quantize.")
@click.option("--calib-samples", default=128, type=click.IntRange(3), metavar="N", help="Sequences of tokens.")
@click.option("--calib-seqlen", default=2048, type=click.IntRange(2), metavar="T", help="Tokens in each sequence.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), metavar="N", help="Random seed.")
@click.option("--epochs", default=2, type=click.IntRange(1), metavar="N", help="Passes over the sequences.")
@click.option("--lr", default=1e-3, type=float, metavar="X", help="Learning rate of the norms' gains.")
@click.option("--batch", default=4, type=click.IntRange(1), metavar="N", help="Sequences per step of the optimizer.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Device to run on.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of ptq there.")
@click.option("--trust-remote-code", is_flag=True, help="Allow running Python code from the model repository.")
@click.option("--json", "as_json", is_flag=True, help="Print losses and the new folder as one JSON object on stdout.")
def command(
    result: str,
    out: Path,
    reference: str | None,
    calib: str,
    calib_samples: int,
    calib_seqlen: int,
    seed: int,
    epochs: int,
    lr: float,
    batch: int,
    device: str,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Tune the norms of OUT, a folder of ptq quantize, end to end against the full-precision model.

    Weights stay packed as they are, and no byte is added: the gains of norms (one number per channel) learn by the KL
    divergence of the next token. An eighth of the sequences is held out and decides what is kept, so that the new
    folder is never worse on them. Both models must fit in memory.

    \b
    Examples:
      ptq tune OUT -o OUT-tuned
      ptq tune OUT -o OUT-tuned --calib text.txt --calib-samples 32 --calib-seqlen 512
    """
    from cli.shared.models import load_tokenizer
    from cli.shared.terminal.progress import ProgressListener
    from cli.shared.terminal.screen import console, echo
    from ptq import load_calibration
    from ptq.tuning import TuneConfig, tune

    config = TuneConfig(epochs=epochs, lr=lr, batch=batch, seed=seed)
    tokenizer = load_tokenizer(result, trust_remote_code=trust_remote_code)
    calibration = load_calibration(calib, tokenizer, samples=calib_samples, seqlen=calib_seqlen, seed=seed)
    with ProgressListener(console(stderr=True)) as listener:
        found = tune(
            result,
            out=out,
            calibration=calibration,
            reference=reference,
            config=config,
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            on_event=listener,
        )
    tuning = found.report.environment["tuning"]
    if as_json:
        echo(json.dumps({"out": str(out), **tuning}))
        return
    echo(
        f"KL on {tuning['sequences_held_out']} sequences held out: {found.kl_before:.4f} -> {found.kl_after:.4f} "
        f"after {tuning['steps']} steps; written to {out}"
    )
