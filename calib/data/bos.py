"""The beginning of a sequence: whether a tokenizer puts a BOS token before a text, and windows that begin with it.

A model whose tokenizer adds BOS has seen nothing but sequences that begin with it. Some families do not work at all
without it, because the first token takes the attention that no other token is due; others hardly notice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calib.errors import UsageError, unknown_name

__all__ = ["BOS_CHOICES", "check_bos_choice", "starts_with_bos", "window_bos", "with_bos", "without_bos"]

BOS_CHOICES = ("auto", "always", "never")


def check_bos_choice(choice: object, option: str) -> None:
    """Refuse what is none of `BOS_CHOICES`.

    Args:
        choice: as given by the user.
        option: what the user calls it, for the message.

    Raises:
        UsageError: names the option and the choices.
    """
    if choice not in BOS_CHOICES:
        raise unknown_name(f"choice for {option}", str(choice), BOS_CHOICES)


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before a text, which is how the model was trained."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    ids = tokenizer("a", truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    return len(ids) > 0 and int(ids[0]) == bos


def window_bos(tokenizer: Any, choice: str, option: str) -> int | None:
    """The token that every window of a text begins with, or ``None`` where windows hold nothing but text.

    Args:
        tokenizer: of the model.
        choice: ``auto`` follows the tokenizer, ``always`` takes its BOS token even where it adds none by itself.
        option: what the user calls the choice, for messages.

    Raises:
        UsageError: an unknown choice, or ``always`` with a tokenizer that has no BOS token.
    """
    check_bos_choice(choice, option)
    if choice == "never" or (choice == "auto" and not starts_with_bos(tokenizer)):
        return None
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise UsageError(f"{option} always needs a BOS token, and this tokenizer has none; leave {option} away.")
    return int(bos)


def without_bos(tokens: Tensor, bos: int) -> Tensor:
    """``tokens [tokens]`` less the BOS tokens that it begins with."""
    others = (tokens != bos).nonzero()
    return tokens[int(others[0]) :] if len(others) else tokens[:0]


def with_bos(windows: Tensor, bos: int) -> Tensor:
    """``windows [windows, tokens]`` with BOS in front of each."""
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)
