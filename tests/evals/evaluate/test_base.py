"""`evals.evaluate` against a base: divergence, its record, its cache, and bases that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import evals
from calib.data.tokens import tokenize, tokenizer_hash
from calib.errors import ModelError
from evals.evaluate import measure, measure_base, module_store
from evals.job import load_workload
from evals.record import Record
from evals.tasks.metrics import answers
from tests.evals.evaluate.rows import ROWS, Make, against, content


@pytest.mark.parametrize("top_k", [None, 32])
def test_a_model_against_itself(make_model: Make, tiny_tokenizer: Any, data: Path, top_k: int | None) -> None:
    model = make_model("llama")
    record = against(model, model, tiny_tokenizer, data, base_top_k=top_k)
    found = record.texts[0].divergence
    assert found is not None
    assert record.base is not None
    assert found.kl_mean == pytest.approx(0, abs=1e-7)
    if top_k is None:
        assert (found.kl_mean, found.kl_max, found.kl_low, found.kl_high, found.kl_draw_error) == (0, 0, 0, 0, 0)
    assert (found.top1_agreement, found.dp_rms, found.log_ratio) == (1, 0, 0)
    assert found.base == record.base.model.fingerprint == record.model.fingerprint
    for own, other in zip(record.tasks, record.base.tasks, strict=True):
        assert (answers(own.items, "acc") == answers(other.items, "acc")).all()
        assert own.items["ll"].tolist() == other.items["ll"].tolist()
        assert own.items.fingerprint == other.items.fingerprint
    assert record.texts[0].nll == record.base.texts[0].nll
    assert evals.compare([record]).differences[0].difference == 0


@torch.no_grad()
def _log_softmaxes(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(model(tokens).logits[:, :-1].double(), dim=-1)


def test_the_base_s_record_is_its_own(make_model: Make, tiny_tokenizer: Any, data: Path, text: str) -> None:
    model, base = make_model("llama", 1), make_model("llama", 0)
    record = against(model, base, tiny_tokenizer, data, base_top_k=None)
    alone = evals.evaluate(base, tiny_tokenizer, ["arc_easy", "wikitext2", "lambada_openai"], data=data, seqlen=20)
    assert record.base is not None
    assert record.base.texts[0].items["nll"] == pytest.approx(alone.texts[0].items["nll"], rel=1e-6)
    assert record.base.tasks[0].items["ll"] == pytest.approx(alone.tasks[0].items["ll"], abs=1e-5)
    assert record.base.model.fingerprint == alone.model.fingerprint != record.model.fingerprint
    found = record.texts[0].divergence
    assert found is not None
    tokens = tokenize(text, tiny_tokenizer)
    segments = tokens[: len(tokens) // 20 * 20].view(-1, 20)
    q, p = _log_softmaxes(model, segments), _log_softmaxes(base, segments)
    kl = (p.exp() * (p - q)).sum(-1)
    true = segments[:, 1:, None]
    change = (q.gather(2, true).exp() - p.gather(2, true).exp())[..., 0]
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-4)
    assert found.top1_agreement == pytest.approx(float((q.argmax(-1) == p.argmax(-1)).double().mean()))
    assert found.dp_rms == pytest.approx(float(change.square().mean().sqrt()), rel=1e-4)
    assert found.dp_mean == pytest.approx(float(change.mean()), rel=1e-3, abs=1e-7)
    ratio = float((p.gather(2, true) - q.gather(2, true)).mean())
    assert found.log_ratio == pytest.approx(ratio, rel=1e-4)
    shrink = math.sqrt(1 - 1 / len(kl))  # the bootstrap divides by n
    paired = (p.gather(2, true) - q.gather(2, true))[..., 0].mean(1).std() / math.sqrt(len(kl))
    assert found.log_ratio_standard_error == pytest.approx(float(paired) * shrink, rel=0.05)
    items = record.texts[0].items
    assert items["kl"] == pytest.approx(kl.sum(-1).numpy(), rel=1e-4)
    assert items["same_top"].tolist() == (q.argmax(-1) == p.argmax(-1)).sum(-1).tolist()
    spread = float((kl.mean(1)).std() / math.sqrt(len(kl)))
    assert found.kl_standard_error == pytest.approx(spread * shrink, rel=0.05)


def test_the_base_is_run_once(make_model: Make, tiny_tokenizer: Any, data: Path) -> None:
    base = make_model("llama")
    runs: list[Any] = []
    base.base_model.register_forward_hook(lambda *_: runs.append(1))
    first = against(make_model("llama", 1), base, tiny_tokenizer, data)
    assert runs
    runs.clear()
    second = against(make_model("llama", 2), base, tiny_tokenizer, data)
    assert not runs
    assert first.base is not None
    assert second.base is not None
    assert content(second.base) == content(first.base)
    base.get_input_embeddings().weight.data[7] += 1  # another model now
    third = against(make_model("llama", 2), base, tiny_tokenizer, data)
    assert runs
    assert third.base is not None
    assert third.base.model.fingerprint != first.base.model.fingerprint


def test_rows_with_subjects_are_not_those_without(make_model: Make, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The strings that are asked are the same, what counts as a draw is not: the kept result must not be taken."""
    model = make_model("llama")

    def run(rows: list[dict[str, Any]]) -> Record:
        (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return evals.evaluate(model, tiny_tokenizer, ["quiz"], data=tmp_path, against=model, cache=tmp_path / "c")

    run(ROWS["arc_easy"])
    record = run([row | {"subject": "s"} for row in ROWS["arc_easy"]])
    assert record.base is not None
    assert record.base.tasks[0].clusters is not None


def with_bos(tokenizer: Any) -> Any:
    """The same vocabulary, cutting text otherwise."""
    backend = tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_a_base_with_another_tokenizer_is_refused(
    make_model: Make, tiny_tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    workload = load_workload(["wikitext2"], data=data, seqlen=20)
    model = make_model("llama")
    base = measure_base(
        module_store(model, with_bos(tiny_tokenizer), tmp_path),
        workload,
        lambda: (model, with_bos(tiny_tokenizer), None),
    )
    with pytest.raises(ModelError, match="the base LlamaForCausalLM has another tokenizer: its tokens are not"):
        measure(model, tiny_tokenizer, workload, base=base)


def test_another_tokenizer_for_both_is_another_question(make_model: Make, tiny_tokenizer: Any, data: Path) -> None:
    model = make_model("llama")
    against(model, model, tiny_tokenizer, data)
    record = against(model, model, with_bos(tiny_tokenizer), data)
    assert record.tokenizer_hash == tokenizer_hash(with_bos(tiny_tokenizer))
    assert record.base is not None
    assert record.base.tokenizer_hash == record.tokenizer_hash


def test_a_base_with_another_vocabulary_is_refused(make_model: Make, tiny_tokenizer: Any, data: Path) -> None:
    larger = make_model("llama")
    larger.resize_token_embeddings(larger.config.vocab_size + 8, mean_resizing=False)
    count = len(tiny_tokenizer)
    with pytest.raises(ModelError, match=f"vocabularies of {count + 8} and {count} entries"):
        against(larger, make_model("llama"), tiny_tokenizer, data)


def test_a_base_with_another_context_is_refused_where_windows_follow_it(
    make_model: Make, tiny_tokenizer: Any, data: Path
) -> None:
    shorter = make_model("llama")
    shorter.config.max_position_embeddings = 32
    with pytest.raises(ModelError, match=r"the base reads wikitext2 in other windows .*Say --seqlen"):
        against(make_model("llama"), shorter, tiny_tokenizer, data, seqlen=None)
