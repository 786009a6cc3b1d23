"""A text -> what a model is shown and which of its tokens are scored: four conventions whose numbers do not compare.

    segments    the literature of post-training quantization: disjoint segments of 2,048 tokens, the first not scored
    llamacpp    llama-perplexity: disjoint chunks of 512, BOS in front if the model uses one, the second half scored
    sliding     windows that overlap; only the last ``stride`` tokens of each are scored, so all have long contexts
    documents   lm-evaluation-harness: every token of every document, BOS or EOS in front, windows of the full context

``segments`` and ``sliding`` have nothing in front of a window in the literature. With ``bos`` each begins with BOS, and
every token of the text is scored; which of the two a model was made for is found by `evals.bos_choice`.

A `Window` is one forward pass; its targets from ``first`` on are scored. An item is what is drawn at random when the
error of a figure is computed: a window, or a document with all its windows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calib.data.bos import starts_with_bos, with_bos, without_bos
from calib.data.tokens import tokenize
from calib.errors import DataError, UsageError, unknown_name
from evals.texts.documents import Document, split_documents

__all__ = [
    "CONVENTIONS",
    "Plan",
    "Window",
    "check_vocabulary",
    "context_length",
    "make_plan",
    "prefix_token",
    "starts_with_bos",
    "window_bytes",
]


@dataclasses.dataclass(frozen=True)
class Window:
    """Token ids shown in one pass: int64 ``[tokens]``; ``ids[first:]`` are scored; ``item`` is what they belong to."""

    ids: Tensor
    first: int
    item: int

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.first


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be scored.

    Args:
        convention: its name.
        settings: whatever else decides the figure.
        windows: in order.
        bytes: of each item; ``None`` where they are unknown or have no meaning.
        words: of each item; ``None`` where they are unknown or have no meaning.
        notes: what a reader must know.
    """

    convention: str
    settings: dict[str, Any]
    windows: tuple[Window, ...]
    bytes: tuple[int, ...] | None
    words: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def hashes(self) -> list[int]:
        """64 bits of a sha256 over each item's windows: ids, and where scoring begins."""
        digests = [hashlib.sha256() for _ in range(1 + max(window.item for window in self.windows))]
        for window in self.windows:
            digests[window.item].update(f"{window.first}:{len(window.ids)}:".encode())
            digests[window.item].update(window.ids.numpy().astype("<i8").tobytes())
        return [int.from_bytes(digest.digest()[:8], "little") for digest in digests]


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a convention is given; ``seqlen`` and ``stride`` are resolved."""

    text: str
    tokenizer: Any
    seqlen: int
    stride: int
    max_tokens: int | None
    documents: str
    bos: bool | None
    templated: bool

    def tokens(self) -> Tensor:
        """The text, tokenized once, int64 ``[tokens]``."""
        tokens = tokenize(self.text, self.tokenizer, special_tokens=not self.templated)
        return tokens if self.max_tokens is None else tokens[: self.max_tokens]

    @property
    def asked(self) -> dict[str, Any]:
        """``bos`` for the settings, where it was a question."""
        return {} if self.bos is None else {"bos": self.bos}


def make_plan(
    text: str,
    tokenizer: Any,
    model: Any,
    *,
    convention: str = "segments",
    seqlen: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    limit: int | None = None,
    documents: str = "auto",
    bos: bool | None = None,
    templated: bool = False,
) -> Plan:
    """Cut a text by a convention.

    Args:
        text: the characters.
        tokenizer: of the model.
        model: its context and vocabulary are checked.
        convention: a name of the table above.
        seqlen: tokens of a window; ``None`` is 2,048, 512 for ``llamacpp``, the model's context for ``documents``.
        stride: for ``sliding``: tokens scored in a window; ``None`` is a quarter of ``seqlen``.
        max_tokens: use the first so many tokens of the text (for ``documents``: whole documents up to there).
        limit: the first so many items only.
        documents: how ``documents`` are told apart (`evals.texts.documents.split_documents`).
        bos: whether every window begins with BOS; ``None`` is the convention as others compute it: nothing in front for
            ``segments`` and ``sliding``, what the tokenizer adds for ``llamacpp``. ``documents`` always have a prefix.
        templated: the text holds the special tokens of a chat template already.

    Raises:
        UsageError: an unknown convention, a window below 2 tokens, a stride that is not in ``1 .. seqlen - 1``, BOS
            with a tokenizer that has none.
        DataError: a window above the context, a text that is too short, ids that the model does not have.
    """
    if convention not in CONVENTIONS:
        raise unknown_name("perplexity convention", convention, CONVENTIONS)
    length = _checked_seqlen(convention, seqlen, model)
    step = _checked_stride(convention, stride, length)
    if bos and getattr(tokenizer, "bos_token_id", None) is None:
        raise UsageError("--bos always needs a BOS token, and this tokenizer has none; leave --bos away.")
    plan = CONVENTIONS[convention](_Request(text, tokenizer, length, step, max_tokens, documents, bos, templated))
    kept = plan if limit is None else _limited(plan, limit)
    check_vocabulary(torch.cat([window.ids for window in kept.windows]), model)
    return kept


def prefix_token(tokenizer: Any) -> int:
    """The token in front of what has no context: BOS, else EOS, as in lm-evaluation-harness.

    Raises:
        DataError: the tokenizer has neither.
    """
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise DataError(
        "the tokenizer has neither a BOS nor an EOS token, and scoring from a document's first token needs one; "
        "use --convention segments."
    )


def _segments(request: _Request) -> Plan:
    if request.bos:
        bos = int(request.tokenizer.bos_token_id)
        text = without_bos(request.tokens(), bos)
        chunks: Sequence[Tensor] = list(with_bos(torch.stack(_chunks(request, text, request.seqlen - 1)), bos))
    else:
        chunks = _chunks(request, request.tokens(), request.seqlen)
    windows = tuple(Window(ids, 1, item) for item, ids in enumerate(chunks))
    settings = {"seqlen": request.seqlen, "max_tokens": request.max_tokens, **request.asked}
    return Plan("segments", settings, windows, window_bytes(windows, request.tokenizer))


def _llamacpp(request: _Request) -> Plan:
    bos = starts_with_bos(request.tokenizer) if request.bos is None else request.bos
    windows = []
    for item, chunk in enumerate(_chunks(request, request.tokens(), request.seqlen)):
        ids = chunk.clone()
        if bos:
            ids[0] = request.tokenizer.bos_token_id
        windows.append(Window(ids, request.seqlen // 2 + 1, item))  # position seqlen // 2 predicts the token behind it
    settings = {"seqlen": request.seqlen, "max_tokens": request.max_tokens, "bos": bos}
    found = tuple(windows)
    return Plan("llamacpp", settings, found, window_bytes(found, request.tokenizer))


def _sliding(request: _Request) -> Plan:
    tokens, front = request.tokens(), torch.empty(0, dtype=torch.int64)
    if request.bos:
        bos = int(request.tokenizer.bos_token_id)
        tokens, front = without_bos(tokens, bos), torch.tensor([bos])
    if len(tokens) < 2:
        raise DataError(f"the text has {len(tokens)} tokens; at least 2 are needed.")
    windows: list[Window] = []
    done = 1 - len(front)  # the text's first token is scored only if BOS stands before it
    for start in range(0, len(tokens), request.stride):
        end = min(start + request.seqlen - len(front), len(tokens))
        if end > done:
            ids = torch.cat([front, tokens[start:end]])
            windows.append(Window(ids, len(front) + done - start, len(windows)))
        done = end
        if end == len(tokens):
            break
    settings = {"seqlen": request.seqlen, "stride": request.stride, "max_tokens": request.max_tokens, **request.asked}
    found = tuple(windows)
    return Plan("sliding", settings, found, window_bytes(found, request.tokenizer))


def _documents(request: _Request) -> Plan:
    prefix = prefix_token(request.tokenizer)
    found, rule = split_documents(request.text, request.documents)
    windows: list[Window] = []
    kept: list[Document] = []
    used = 0
    for document in found:
        ids = tokenize(document.shown, request.tokenizer, special_tokens=not request.templated)
        if request.max_tokens is not None and kept and used + len(ids) > request.max_tokens:
            break
        if len(ids) == 0:
            continue
        windows += _rolling(ids, prefix, request.seqlen, len(kept))
        kept.append(document)
        used += len(ids)
    if not kept:
        raise DataError("the text has no documents with tokens in them.")
    settings = {"seqlen": request.seqlen, "max_tokens": request.max_tokens, "documents": rule}
    sizes = tuple(len(document.original.encode("utf-8", "surrogatepass")) for document in kept)
    words = tuple(len(re.split(r"\s+", document.original)) for document in kept)
    return Plan("documents", settings, tuple(windows), sizes, words)


CONVENTIONS: dict[str, Callable[[_Request], Plan]] = {
    "segments": _segments,
    "llamacpp": _llamacpp,
    "sliding": _sliding,
    "documents": _documents,
}
_SEQLEN = {"segments": 2048, "llamacpp": 512, "sliding": 2048}


def _rolling(ids: Tensor, prefix: int, length: int, item: int) -> list[Window]:
    """Every token of ``ids [tokens]`` predicted once, by windows of ``length`` inputs; the last has a full context."""
    whole = torch.cat([torch.tensor([prefix]), ids])
    windows = []
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))  # predicts ids[start:end], which is whole[start + 1 : end + 1]
        left = max(0, end - length)
        windows.append(Window(whole[left : end + 1], start + 1 - left, item))
    return windows


def _chunks(request: _Request, tokens: Tensor, length: int) -> list[Tensor]:
    """Disjoint pieces of ``length`` tokens; the remainder is dropped."""
    count = len(tokens) // length
    if count == 0:
        cap = "" if request.max_tokens is None else f" (with --max-tokens {request.max_tokens})"
        raise DataError(
            f"the text has {len(tokens)} tokens{cap}, one segment needs {length}; "
            "give a longer text or a shorter --seqlen."
        )
    return list(tokens[: count * length].view(count, length))


def window_bytes(windows: Sequence[Window], tokenizer: Any) -> tuple[int, ...]:
    """UTF-8 bytes of the scored tokens of each window: of all its text, less that of what is context only.

    Decoded as a whole, because some tokenizers strip a space at the start of what they decode. Where an edge cuts a
    character of several bytes, the replacement character stands for the piece: at most three bytes off an edge.
    """

    def size(ids: Tensor) -> int:
        text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return len(text.encode())

    return tuple(size(window.ids) - size(window.ids[: window.first]) for window in windows)


def _checked_seqlen(convention: str, seqlen: int | None, model: Any) -> int:
    context = context_length(model)
    if seqlen is None:
        usual = _SEQLEN.get(convention) or context or 2048
        return usual if context is None else min(usual, context)
    least, why = (3, "the second half is scored") if convention == "llamacpp" else (2, "the first is context only")
    if seqlen < least:
        raise UsageError(f"a segment needs at least {least} tokens ({why}), got seqlen {seqlen}.")
    if context is not None and seqlen > context:
        raise DataError(f"segments of {seqlen} tokens exceed the model's context of {context}; use --seqlen {context}.")
    return seqlen


def _checked_stride(convention: str, stride: int | None, seqlen: int) -> int:
    if convention != "sliding":
        if stride is not None:
            raise UsageError(f"--stride belongs to --convention sliding; {convention!r} has none.")
        return 0
    step = max(1, seqlen // 4) if stride is None else stride
    if not 0 < step < seqlen:
        raise UsageError(f"the stride must be in 1 .. {seqlen - 1} (below --seqlen {seqlen}), got {step}.")
    return step


def _limited(plan: Plan, limit: int) -> Plan:
    windows = tuple(window for window in plan.windows if window.item < limit)
    return dataclasses.replace(
        plan,
        windows=windows,
        settings=plan.settings | {"limit": limit},
        bytes=None if plan.bytes is None else plan.bytes[:limit],
        words=None if plan.words is None else plan.words[:limit],
    )


def context_length(model: Any) -> int | None:
    """The longest sequence that a model's config names, or ``None`` if it names none."""
    length = getattr(_text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_vocabulary(tokens: Tensor, model: Any) -> None:
    """Refuse token ids that the model has no row for.

    Raises:
        DataError: an id is negative or beyond the vocabulary.
    """
    size = getattr(_text_config(model), "vocab_size", None)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (isinstance(size, int) and high >= size):
        raise DataError(
            f"the tokens range over {low} .. {high}, but the model's vocabulary has {size} entries; "
            "the tokenizer does not belong to this model."
        )
