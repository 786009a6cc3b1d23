"""A tokenizer as llama.cpp reads it: tokens, merges or scores, special tokens, the chat template.

Two kinds are written. Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) needs the name of the rule by which llama.cpp
splits a text first; it is found by the tokenizer's own rule. BPE with byte fallback (Llama 2, Mistral, Gemma) is
SentencePiece there: a token's score is less the later it was merged.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerFast

from ptq.errors import UsageError

__all__ = ["add_vocabulary", "split_rule", "tokenizer_file"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2", _TEKKEN: "tekken", _GPT4O: "gpt-4o"}
"""llama.cpp's names, by the pattern that splits a text."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def split_rule(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which a ``tokenizer.json`` splits a text.

    Raises:
        UsageError: none that is known.
    """
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and patterns[0] in _RULES:
        return _RULES[patterns[0]]
    raise UsageError(
        f"the tokenizer splits a text by a rule ({', '.join(map(str, kinds))}) that ptq does not know a llama.cpp name "
        "of: write a dequantized folder (--format f16), and convert it with convert_hf_to_gguf.py of llama.cpp."
    )


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer of a model's folder.

    Raises:
        UsageError: there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no tokenizer.json, which a GGUF file needs: put it there first.")
    return path


def add_vocabulary(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Add the tokenizer in a folder.

    Args:
        writer: of the file.
        folder: with ``tokenizer.json``.
        size: rows of the embedding.

    Raises:
        UsageError: no tokenizer, or one of another kind.
    """
    path = tokenizer_file(folder)
    stated: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = stated.get("model") or {}
    if model.get("type") != "BPE":
        raise UsageError(f"{path} is a {model.get('type')} tokenizer, and ptq writes BPE to GGUF.")
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    pieces = bool(model.get("byte_fallback"))
    rule = "default" if pieces else split_rule(stated)
    tokens, kinds = _tokens(tokenizer, size, pieces=pieces)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(_scores(stated, tokens))
        writer.add_add_space_prefix(_adds_space(stated))
    writer.add_token_types(kinds)
    _add_special(writer, folder, tokenizer, size, merges=not pieces)


def _tokens(tokenizer: Any, size: int, *, pieces: bool) -> tuple[list[str], list[int]]:
    """Texts and kinds of all tokens, with fillers up to the rows of the embedding."""
    by_number = {number: text for text, number in tokenizer.get_vocab().items()}
    largest = max(by_number, default=-1)
    if largest >= size:
        raise UsageError(
            f"the tokenizer has token {largest}, but the model's embedding has {size} rows: they do not belong "
            "together."
        )
    added = tokenizer.added_tokens_decoder
    unknown = getattr(tokenizer, "unk_token_id", None)
    tokens, kinds = [], []
    for number in range(size):
        text = by_number.get(number)
        if text is None:
            tokens.append(f"[PAD{number}]")
            kinds.append(int(TokenType.UNUSED))
            continue
        kind = TokenType.NORMAL
        if pieces and number == unknown:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number].special or _looks_special(text) else TokenType.USER_DEFINED
            text = text if kind == TokenType.CONTROL else text.replace("\u2581", " ")
        elif pieces and _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        tokens.append(text)
        kinds.append(int(kind))
    return tokens, kinds


def _looks_special(text: str) -> bool:
    """Some models mark control tokens as ordinary ones."""
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or bool(re.fullmatch(r"<\|.*\|>|<unused.*>", text))


def _scores(stated: dict[str, Any], tokens: list[str]) -> list[float]:
    """The earlier a token was merged, the higher its score: llama.cpp joins the pair of the highest one first."""
    merges = stated["model"].get("merges") or []
    order: dict[str, int] = {}
    for number, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        order.setdefault(left + right, number)
    return [-float(order[token]) - 1.0 if token in order else -1e9 for token in tokens]


def _adds_space(stated: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    text = json.dumps([stated.get("normalizer"), stated.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _add_special(writer: GGUFWriter, folder: Path, tokenizer: Any, size: int, *, merges: bool) -> None:
    special = SpecialVocab(folder, load_merges=merges, n_vocab=size)
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            special.special_token_ids[name] = number
    # What the tokenizer does with an empty text, whatever its files say.
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    special.add_special_token["bos"] = bool(ids) and ids[0] == getattr(tokenizer, "bos_token_id", None)
    if special.chat_template is None and getattr(tokenizer, "chat_template", None):
        special.chat_template = tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)
