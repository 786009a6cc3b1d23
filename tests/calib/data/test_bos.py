"""Windows that begin with BOS, and that nothing changes where the tokenizer adds none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from calib.data.bos import starts_with_bos, with_bos, without_bos
from calib.data.sampling import _first_tokens
from calib.data.tokens import Calibration, load_calibration, tokenize
from calib.errors import UsageError

WORDS = " ".join(f"word{i}" for i in range(400))
BOS = 0


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def adds_bos(tiny_tokenizer: Any) -> Any:
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def load(source: str, tokenizer: Any, **changes: Any) -> Calibration:
    return load_calibration(source, tokenizer, **({"samples": 20, "seqlen": 16, "seed": 0} | changes))


def test_every_window_begins_as_every_text_does(words: str, adds_bos: Any, tiny_tokenizer: Any) -> None:
    found = load(words, adds_bos)
    stream = tokenize(WORDS, tiny_tokenizer)
    pieces = {tuple(row.tolist()) for row in stream[: len(stream) // 15 * 15].view(-1, 15)}
    assert found.tokens.shape == (20, 16)
    assert (found.tokens[:, 0] == BOS).all()
    assert {tuple(row.tolist()) for row in found.tokens[:, 1:]} <= pieces
    assert found.describe()["bos"] is True


def test_without_bos_the_old_windows(words: str, adds_bos: Any) -> None:
    found = load(words, adds_bos, bos="never")
    stream = tokenize(WORDS, adds_bos)
    pieces = {tuple(row.tolist()) for row in stream[: len(stream) // 16 * 16].view(-1, 16)}
    assert {tuple(row.tolist()) for row in found.tokens} <= pieces
    assert found.describe()["bos"] is False
    assert found.fingerprint != load(words, adds_bos).fingerprint


def test_nothing_changes_where_the_tokenizer_adds_none(words: str, tiny_tokenizer: Any) -> None:
    auto, never, always = (load(words, tiny_tokenizer, bos=bos) for bos in ("auto", "never", "always"))
    assert "bos" not in auto.describe()
    assert torch.equal(auto.tokens, never.tokens)
    assert (always.tokens[:, 0] == BOS).all()
    assert always.describe()["bos"] is True


def test_overlapping_windows_too(tmp_path: Path, adds_bos: Any) -> None:
    path = tmp_path / "short.txt"
    path.write_text("".join(chr(33 + place) for place in range(56)), encoding="utf-8")
    found = load(str(path), adds_bos)
    assert len({tuple(row.tolist()) for row in found.tokens}) == len(found.tokens) == 20
    assert (found.tokens[:, 0] == BOS).all()
    assert (found.tokens[:, 1:] != BOS).all()
    assert found.notes == ("windows overlap: 56 tokens for 20 sequences of 15 behind BOS",)


def test_refusals(words: str, adds_bos: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"unknown choice for --calib-bos 'on'\. .*Known: always, auto, never"):
        load(words, tiny_tokenizer, bos="on")
    with pytest.raises(UsageError, match="no room for text after BOS"):
        load(words, adds_bos, seqlen=1)
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(UsageError, match="--calib-bos always needs a BOS token, and this tokenizer has none"):
        load(words, bare, bos="always")
    assert not starts_with_bos(bare)


def test_sampled_sequences(adds_bos: Any) -> None:
    def sampler(samples: int, seqlen: int, seed: int) -> torch.Tensor:
        return torch.full((samples, seqlen), seed)

    assert load("self", adds_bos, seed=BOS, sampler=sampler).bos is True
    assert load("self", adds_bos, seed=3, sampler=sampler).bos is False  # the record says what is there


def test_the_first_token_of_what_a_model_writes() -> None:
    config = SimpleNamespace(bos_token_id=3, vocab_size=10)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    uniform = torch.tensor([0.05, 0.55])
    assert _first_tokens(model, uniform, "config").tolist() == [3, 3]
    assert _first_tokens(model, uniform, 0).tolist() == [0, 0]
    assert _first_tokens(model, uniform, None).tolist() == [0, 5]


def test_bos_is_taken_off_and_put_on() -> None:
    assert without_bos(torch.tensor([0, 0, 5, 0, 6]), 0).tolist() == [5, 0, 6]
    assert without_bos(torch.tensor([0]), 0).tolist() == []
    assert with_bos(torch.tensor([[5], [6]]), 0).tolist() == [[0, 5], [0, 6]]
