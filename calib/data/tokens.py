"""Text -> a fingerprinted batch of tokens: what a quantization was calibrated on, exactly and repeatably.

The whole text is tokenized once, with the special tokens that the tokenizer itself puts around one document and no
others; the sequences are windows of that stream, each after a BOS token where the tokenizer puts one before a text.
``self`` skips the text: the model writes its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calib.data.bos import window_bos, with_bos, without_bos
from calib.data.chat import RowReader, check_template_choice
from calib.data.sampling import sample_from_model
from calib.data.sources import SELF, Text, read_text
from calib.errors import DataError, UsageError

__all__ = [
    "Calibration",
    "load_calibration",
    "sample_from_model",
    "tokenize",
    "tokenizer_hash",
]

_CHARACTERS_PER_TOKEN = 16  # how far a hub data set is read: four times what English needs


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Tokens and their birth certificate.

    Args:
        tokens: int64 ``[sequences, seqlen]`` on the CPU.
        source: the name or path as given.
        seed: seed of the draw.
        tokenizer_hash: `tokenizer_hash` of the tokenizer.
        text_sha256: hash of the text that was tokenized; ``None`` for ``self``.
        text_tokens: tokens of the whole text, from which the sequences were drawn; 0 for ``self``.
        notes: what a reader must know (overlapping windows, a data set not read to its end).
        bos: whether every sequence begins with a BOS token; ``None`` where that is no question, because the tokenizer
            puts none before a text and nobody asked for one.
    """

    tokens: Tensor
    source: str
    seed: int
    tokenizer_hash: str
    text_sha256: str | None = None
    text_tokens: int = 0
    notes: tuple[str, ...] = ()
    bos: bool | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokens, their shape, the source, the seed, the tokenizer's hash and `bos` where it is set."""
        known: list[Any] = [list(self.tokens.shape), self.source, self.seed, self.tokenizer_hash]
        head = json.dumps(known + ([] if self.bos is None else [{"bos": self.bos}]))
        digest = hashlib.sha256(head.encode())
        digest.update(self.tokens.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Plain data for a report."""
        sequences, seqlen = self.tokens.shape
        return {
            "source": self.source,
            "seed": self.seed,
            "sequences": sequences,
            "seqlen": seqlen,
            "tokenizer_hash": self.tokenizer_hash,
            "text_sha256": self.text_sha256,
            "text_tokens": self.text_tokens,
            **({} if self.bos is None else {"bos": self.bos}),
            "notes": list(self.notes),
            "fingerprint": self.fingerprint,
        }


def load_calibration(
    source: str,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    split: tuple[float, float] = (0.0, 1.0),
    context: int | None = None,
    sampler: Callable[[int, int, int], Tensor] | None = None,
    bos: str = "auto",
    template: str = "auto",
) -> Calibration:
    """Draw ``samples`` sequences of ``seqlen`` tokens from a source (the table in `calib.data.sources`).

    Args:
        source: a path or a name; ``self`` calls ``sampler(samples, seqlen, seed)``.
        tokenizer: a Hugging Face tokenizer.
        samples: number of sequences.
        seqlen: tokens in each, BOS included.
        seed: of a generator of its own; the global one is not touched.
        split: part of the text's characters to use.
        context: the longest sequence that the model takes, if it is known.
        sampler: for ``self``; `sample_from_model` with the model and the first token bound.
        bos: ``auto`` begins every sequence with BOS where the tokenizer puts one before a text; ``always``, ``never``.
        template: ``auto`` writes rows of messages by the tokenizer's chat template, ``always`` takes no other rows,
            ``never`` joins the contents of messages as plain text.

    Raises:
        UsageError: an unknown source or choice, a wrong part, or a part of ``self``.
        DataError: the text cannot be read or is too short, ``seqlen`` exceeds ``context``, no ``sampler`` for ``self``.
    """
    _check_sizes(samples, seqlen, context)
    check_template_choice(template, "--calib-template")
    first = window_bos(tokenizer, bos, "--calib-bos")
    asked = bos != "auto" or first is not None
    identity = tokenizer_hash(tokenizer)
    if source == SELF:
        if template != "auto":
            raise UsageError(f"--calib-template {template} has no effect on 'self', which has no rows; leave it away.")
        tokens = _sampled(sampler, samples, seqlen, seed, split)
        begins = first is not None and bool((tokens[:, 0] == first).all())
        sampled = ("sampled from the model at temperature 1",)
        return Calibration(tokens, source, seed, identity, notes=sampled, bos=begins if asked else None)
    reader = RowReader(template, lambda: tokenizer)
    text = read_text(source, split=split, limit=_CHARACTERS_PER_TOKEN * samples * seqlen, rows=reader)
    stream = tokenize(text.text, tokenizer, special_tokens=not text.templated)
    if first is not None and seqlen < 2:
        raise UsageError("calibration sequences of 1 token have no room for text after BOS; take 2 or more.")
    words = stream if first is None else without_bos(stream, first)
    tokens, notes = _draw(words, samples, seqlen, seed, text, bos=first)
    told = text.notes + notes
    return Calibration(
        tokens, source, seed, identity, text.sha256, stream.numel(), told, first is not None if asked else None
    )


def tokenize(text: str, tokenizer: Any, *, special_tokens: bool = True) -> Tensor:
    """All tokens of one text, int64 ``[tokens]``.

    Args:
        text: the characters.
        tokenizer: a Hugging Face tokenizer.
        special_tokens: with what the tokenizer adds around a single document; not for a text that holds it already.
    """
    options: dict[str, Any] = {} if special_tokens else {"add_special_tokens": False}
    ids = tokenizer(text, truncation=False, return_attention_mask=False, verbose=False, **options)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of everything that decides how a tokenizer cuts text.

    A tokenizer with a backend of the ``tokenizers`` library is hashed by its JSON without the truncation and padding
    that the last call happened to leave there; any other by its class, vocabulary and special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "special": special}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _check_sizes(samples: int, seqlen: int, context: int | None) -> None:
    if samples < 1 or seqlen < 1:
        raise UsageError(f"calibration needs at least one sequence of one token, got {samples} of {seqlen}.")
    if context is not None and seqlen > context:
        raise DataError(
            f"calibration sequences of {seqlen} tokens exceed the model's context of {context}; "
            f"use a sequence length of at most {context}."
        )


def _sampled(
    sampler: Callable[[int, int, int], Tensor] | None, samples: int, seqlen: int, seed: int, split: tuple[float, float]
) -> Tensor:
    if split != (0.0, 1.0):
        raise UsageError(f"the source 'self' has no text to take the part {split[0]:g}:{split[1]:g} of.")
    if sampler is None:
        raise DataError(
            "the source 'self' needs a model to sample from, and there is none; use a text file or 'pydoc'."
        )
    tokens = sampler(samples, seqlen, seed).to("cpu", torch.int64)
    if tokens.shape != (samples, seqlen):
        raise DataError(f"the sampler returned tokens of shape {tuple(tokens.shape)}, not {(samples, seqlen)}.")
    return tokens


def _draw(
    stream: Tensor, samples: int, seqlen: int, seed: int, text: Text, *, bos: int | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Windows ``[samples, seqlen]`` of ``stream [tokens]``: disjoint if there are enough, else overlapping.

    With ``bos`` each is this token and ``seqlen - 1`` of the stream.
    """
    length, after = (seqlen, "") if bos is None else (seqlen - 1, " behind BOS")
    found = stream.numel()
    windows, offsets = found // length, found - length + 1
    needed = max(2 * length, length + samples - 1)
    if found < needed:
        raise DataError(
            f"{text.source!r} has {found} tokens; {samples} different sequences of {length}{after} need at least "
            f"{needed} ({samples * length} without overlap). Give a longer text, or ask for fewer or shorter sequences."
        )
    generator = torch.Generator().manual_seed(seed)
    if windows >= samples:
        starts = torch.randperm(windows, generator=generator)[:samples] * length
        notes: tuple[str, ...] = ()
    else:
        starts = torch.randperm(offsets, generator=generator)[:samples]
        notes = (f"windows overlap: {found} tokens for {samples} sequences of {length}{after}",)
    drawn = stream[starts[:, None] + torch.arange(length)]
    return drawn if bos is None else with_bos(drawn, bos), notes
