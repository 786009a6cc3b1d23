"""``ptq generate``: generate text with a model."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from calib.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from cli.shared.models import LoadedModel

__all__ = ["command"]


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.argument("prompt")
@click.option(
    "--max-new-tokens", default=64, type=click.IntRange(min=1), metavar="N", help="Maximum number of new tokens."
)
@click.option(
    "--temperature", default=0.7, type=click.FloatRange(min=0), help="Sampling temperature; 0 is greedy decoding."
)
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), metavar="N", help="Random seed of sampling.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="Device to run on.")
@click.option(
    "--dtype",
    default="auto",
    metavar="DTYPE",
    help="Data type of activations and unquantized weights: auto, float32, bfloat16 or float16.",
)
@click.option("--compile", "compiled", is_flag=True, help="On a GPU compile the step first (torch.compile, a minute).")
@click.option("--trust-remote-code", is_flag=True, help="Allow running Python code from the model repository.")
@click.option("--json", "as_json", is_flag=True, help="Print text, tokens and speed as one JSON object on stdout.")
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: str,
    compiled: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Generate text with MODEL (a folder, a .gguf file or a hub id), starting from PROMPT.

    \b
    Examples:
      ptq generate OUT "Once upon a time"
      ptq generate OUT "The capital of France is" --temperature 0 --max-new-tokens 8
      ptq generate OUT "Once upon a time" --seed 1 --json
    """
    from cli.shared.idle import given_options, idle_sentences
    from cli.shared.models import load_model
    from cli.shared.terminal.screen import echo
    from ptq.runtime.chosen import kernel_line

    drawn = {"seed": "at temperature 0 nothing is drawn"} if temperature == 0 else {}
    for sentence in idle_sentences(given_options(click.get_current_context()), drawn):
        echo(sentence, err=True)
    if not prompt:
        raise UsageError('the prompt is empty; give some text to continue, for example "Once upon a time".')
    loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    kernels = kernel_line(loaded.model)
    if kernels is not None:
        echo(kernels, err=True)
    started = time.monotonic()
    prompt_ids, new = _continue(loaded, prompt, max_new_tokens, temperature, seed, compiled)
    seconds = time.monotonic() - started
    text = _decode(loaded.tokenizer, prompt_ids, new)
    if not as_json:
        echo(prompt + text)
        if len(new) < max_new_tokens:
            echo("(the model ended the text here)", err=True)
        echo(f"{len(new)} tokens in {seconds:.1f} s ({len(new) / seconds:.1f} per second)", err=True)
        return
    record = {"model": model, "prompt": prompt, "text": text, "prompt_tokens": len(prompt_ids), "tokens": new}
    draw = {"temperature": temperature, "seed": seed}
    echo(json.dumps(record | draw | {"seconds": seconds, "tokens_per_second": len(new) / seconds}))


def _continue(
    loaded: LoadedModel, prompt: str, steps: int, temperature: float, seed: int, compiled: bool
) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of what the model adds, up to and without an end-of-text token."""
    import torch

    from calib.data.static_sampling import decode_steps
    from calib.data.tokens import tokenize
    from cli.shared.terminal.bar import counter_bars

    ids = tokenize(prompt, loaded.tokenizer)
    _check_length(loaded.model, ids, steps)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(1, steps, generator=generator, dtype=torch.float64)
    ends = _end_tokens(loaded.model)
    new: list[int] = []
    with counter_bars() as progress:
        options: dict[str, Any] = {"temperature": temperature, "compiled": compiled, "on_fallback": _say_eager}
        for token in decode_steps(loaded.model, ids[None], uniform, **options):
            if int(token) in ends:
                break
            new.append(int(token))
            progress("tokens", len(new), steps)
    return ids.tolist(), new


def _say_eager(reason: str) -> None:
    from cli.shared.terminal.screen import echo

    echo(f"the model runs slower than it might: {reason}", err=True)


def _check_length(model: Any, ids: Tensor, steps: int) -> None:
    from evals.texts.windows import context_length

    context = context_length(model)
    if ids.numel() == 0:
        raise DataError("the tokenizer finds no token in the prompt; give some text to continue.")
    if context is not None and ids.numel() + steps > context:
        raise DataError(
            f"the prompt's {ids.numel()} tokens and {steps} new ones exceed the model's context of {context}; "
            f"lower --max-new-tokens or shorten the prompt."
        )


def _end_tokens(model: Any) -> set[int]:
    end = getattr(model.generation_config, "eos_token_id", None)
    if end is None:
        return set()
    return set(end) if isinstance(end, list) else {end}


def _decode(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Text of the new tokens. Decoded behind the prompt, because some tokenizers strip a space at the start."""
    whole, start = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt + new, prompt))
    return str(whole[len(start) :] if whole.startswith(start) else tokenizer.decode(new, skip_special_tokens=True))
