"""`evals.evaluate` without a base: texts and tasks together, the figures by plain loops, the harness."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evals
from calib.data.tokens import tokenize, tokenizer_hash
from calib.errors import DataError, UsageError
from evals.items import item_hash
from evals.record import Record
from evals.tasks.registry import load_task
from tests.evals.evaluate.rows import ROWS, Make, content


def test_texts_and_tasks_in_one_record(make_model: Make, tiny_tokenizer: Any, data: Path) -> None:
    model = make_model("llama")
    names = ["arc_easy", "wikitext2", "openbook_qa", "winogrande", "lambada", "mmlu"]
    record = evals.evaluate(model, tiny_tokenizer, names, data=data, seqlen=20)
    assert [text.name for text in record.texts] == ["wikitext2"]
    assert [task.name for task in record.tasks] == ["arc_easy", "openbookqa", "winogrande", "lambada_openai", "mmlu"]
    assert [task.metric for task in record.tasks] == ["acc", "acc_norm", "acc", "acc", "acc"]
    assert [task.chance for task in record.tasks] == [0.25, 0.25, 0.5, None, 0.25]
    assert record.tokenizer_hash == tokenizer_hash(tiny_tokenizer)
    assert (record.model.source, record.model.architecture) == ("LlamaForCausalLM", "LlamaForCausalLM")
    assert record.model.parameters == sum(p.numel() for p in model.parameters())
    assert record.base is record.harness is None
    assert {"ptq", "python", "torch", "transformers", "device", "dtype", "threads", "batch_size"} == set(
        record.environment
    )
    assert Record.from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False))).to_dict() == record.to_dict()
    mmlu = record.tasks[-1]
    assert mmlu.items["cluster"].tolist() == [0, 1, 0, 1]
    assert [task.items.columns.get("greedy") is not None for task in record.tasks] == [0, 0, 0, 1, 0]


def test_answers_are_those_of_a_plain_loop(make_model: Make, tiny_tokenizer: Any, data: Path) -> None:
    model = make_model("gpt2")
    record = evals.evaluate(model, tiny_tokenizer, list(ROWS), data=data)
    for result in record.tasks:
        questions = load_task(result.name, data=data).questions
        expected = [_plain_ll(model, tiny_tokenizer, *pair) for question in questions for pair in question.pairs]
        assert result.items["ll"] == pytest.approx(expected, abs=1e-3)
        texts = [answer for question in questions for answer in question.answers]
        assert result.items["characters"].tolist() == [len(text) for text in texts]
        assert result.items["bytes"].tolist() == [len(text.encode()) for text in texts]
        assert result.items["gold"].tolist() == [question.gold for question in questions]
        ids = [item_hash([[list(pair) for pair in question.pairs], question.gold]) for question in questions]
        assert result.items.ids.tolist() == ids


@torch.no_grad()
def _plain_ll(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    head, whole = (tokenizer(text)["input_ids"] for text in (context, context + continuation))
    log_p = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), dim=-1)
    return sum(float(log_p[i - 1, whole[i]]) for i in range(len(head), len(whole)))


def test_perplexity_by_a_plain_loop(make_model: Make, tiny_tokenizer: Any, data: Path, text: str) -> None:
    model = make_model("llama")
    (found,) = evals.evaluate(model, tiny_tokenizer, ["wikitext2"], data=data, seqlen=24).texts
    ids = torch.tensor(tiny_tokenizer(text)["input_ids"])
    losses = []
    with torch.no_grad():
        for segment in ids[: len(ids) // 24 * 24].view(-1, 24):
            losses.append(float(model(segment[None], labels=segment[None]).loss))
    assert len(losses) > 5
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.tokens == 23 * len(losses)
    assert found.items["nll"] == pytest.approx(np.array(losses) * 23, rel=1e-5)


def test_several_conventions(make_model: Make, tiny_tokenizer: Any, data: Path) -> None:
    names = ["segments", "llamacpp", "sliding", "documents"]
    record = evals.evaluate(
        make_model("llama"), tiny_tokenizer, ["wikitext2"], data=data, convention=names, seqlen=16, stride=4
    )
    assert [text.convention for text in record.texts] == names
    assert len({text.nll for text in record.texts}) == 4
    segments, llamacpp, sliding, documents = record.texts
    assert segments.tokens == 15 * len(segments.items)
    assert llamacpp.tokens == 7 * len(llamacpp.items)
    assert sliding.tokens == len(tokenize((data / "wikitext2.txt").read_text(), tiny_tokenizer)) - 1
    assert documents.tokens == sliding.tokens + 1
    assert documents.words is not None
    assert sliding.settings["stride"] == 4


def test_limits(make_model: Make, tiny_tokenizer: Any, data: Path) -> None:
    record = evals.evaluate(
        make_model("llama"), tiny_tokenizer, ["wikitext2", "arc_easy", "mmlu"], data=data, seqlen=16, limit=1
    )
    assert len(record.texts[0].items) == 1
    assert [len(task.items) for task in record.tasks] == [1, 2]  # the first of each subject
    (text,) = evals.evaluate(
        make_model("llama"), tiny_tokenizer, ["wikitext2"], data=data, seqlen=16, max_tokens=50
    ).texts
    assert (len(text.items), text.settings["max_tokens"]) == (3, 50)


def test_the_same_again(make_model: Make, tiny_tokenizer: Any, data: Path) -> None:
    def once() -> Any:
        record = evals.evaluate(
            make_model("llama"), tiny_tokenizer, ["arc_easy", "wikitext2"], data=data, seqlen=16, fewshot=1, seed=5
        )
        return content(record)

    assert once() == once()


def test_prompts_longer_than_the_context_are_cut_and_counted(
    make_model: Make, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"query": "word " * count, "choices": ["a b c", "d"], "gold": 0} for count in (3, 200, 300)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = evals.evaluate(make_model("gpt2"), tiny_tokenizer, ["quiz"], data=tmp_path).tasks
    assert "2 questions exceed the context of 128 tokens and were cut on the left" in task.notes
    assert np.isfinite(task.items["ll"]).all()


def test_progress_says_what_is_done(make_model: Make, tiny_tokenizer: Any, data: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    evals.evaluate(
        make_model("llama"),
        tiny_tokenizer,
        ["arc_easy", "wikitext2"],
        data=data,
        seqlen=20,
        convention=["segments", "llamacpp"],
        against=make_model("llama", 1),
        cache=tmp_path / "cache",
        batch_size=2,
        progress=lambda *call: calls.append(call),
    )
    names = ["wikitext2", "wikitext2 (llamacpp)", "arc_easy"]
    assert list(dict.fromkeys(name for name, _, _ in calls)) == [f"base: {name}" for name in names] + names
    for name in names:
        done = [(count, total) for found, count, total in calls if found == name]
        assert done[-1][0] == done[-1][1] > 0
        assert [count for count, _ in done] == sorted({count for count, _ in done})
    assert ("arc_easy", 2, 4) in calls


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": ["arc_esy"]}, UsageError, r"unknown task or text 'arc_esy'\. Did you mean 'arc_easy'"),
        ({"tasks": ["piqa"]}, DataError, "has no rows for 'piqa'"),
        ({"convention": "llama.cpp"}, UsageError, "Did you mean 'llamacpp'"),
        ({"seqlen": 129}, DataError, "exceed the model's context of 128"),
        ({"seqlen": 1}, UsageError, "at least 2 tokens"),
        ({"max_tokens": 9, "seqlen": 16}, DataError, r"9 tokens \(with --max-tokens 9\), one segment needs 16"),
        ({"convention": "sliding", "seqlen": 16, "stride": 16}, UsageError, "stride must be in 1 .. 15"),
        ({"convention": "documents", "documents": "pages"}, UsageError, "unknown rule for documents 'pages'"),
        ({"batch_size": "many"}, UsageError, "the batch size must be a number"),
        ({"limit": 0}, UsageError, "limit must be at least 1"),
        ({"base_top_k": 0, "against": "self"}, UsageError, "--base-top-k must be 1 or more"),
        ({"tasks": ["arc_easy"], "fewshot": 9}, UsageError, "9 examples are asked for"),
    ],
)
def test_what_is_refused(
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    make_model: Make,
    tiny_tokenizer: Any,
    data: Path,
) -> None:
    model = make_model("llama")
    if "against" in arguments:
        arguments = arguments | {"against": model}
    with pytest.raises(error, match=message):
        evals.evaluate(model, tiny_tokenizer, **{"tasks": ["wikitext2"], "data": data} | arguments)


def test_one_name_is_a_list_of_one(make_model: Make, tiny_tokenizer: Any, data: Path) -> None:
    record = evals.evaluate(make_model("llama"), tiny_tokenizer, "arc_easy", data=data)
    assert [task.name for task in record.tasks] == ["arc_easy"]


def test_a_text_alone_asks_for_nothing_else(make_model: Make, tiny_tokenizer: Any, data: Path) -> None:
    record = evals.evaluate(make_model("llama"), tiny_tokenizer, texts=[str(data / "wikitext2.txt")], seqlen=20)
    assert [text.name for text in record.texts] == [str(data / "wikitext2.txt")]


# The harness


def test_what_the_harness_is_asked(
    make_model: Make, tiny_tokenizer: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def run(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        calls.append({"tasks": tasks} | options)
        return {"results": {"gsm8k": {"exact_match": 0.5}}}

    monkeypatch.setattr(sys.modules["evals.evaluate"], "run_harness", run)  # the package has a function of that name
    model = make_model("llama")
    record = evals.evaluate(model, tiny_tokenizer, [], harness=["gsm8k", "mmlu"], limit=3, batch_size=4)
    evals.evaluate(model, tiny_tokenizer, [], harness=["gsm8k"], fewshot=2)
    assert calls == [
        {"tasks": ["gsm8k", "mmlu"], "batch_size": 4, "limit": 3, "fewshot": None},
        {"tasks": ["gsm8k"], "batch_size": 1, "limit": None, "fewshot": 2},
    ]
    assert record.harness == {"results": {"gsm8k": {"exact_match": 0.5}}}
    assert dataclasses.replace(record).to_dict()["harness"] == record.harness


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_the_harness_on_rows_of_ones_own(
    make_model: Make, tiny_tokenizer: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's, at import
        pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "foxes.yaml").write_text(
        f"""
task: foxes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data / "arc_easy.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path / "tasks"))
    monkeypatch.setattr("evals.harness._task_manager", lambda include_path: manager)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # asks pip, which takes seconds
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    record = evals.evaluate(make_model("llama"), tiny_tokenizer, ["arc_easy"], data=data, harness=["foxes"])
    assert record.harness is not None
    theirs, ours = record.harness["results"]["foxes"], record.tasks[0].metrics
    assert theirs["acc,none"] == pytest.approx(ours["acc"]["value"])
    assert theirs["acc_norm,none"] == pytest.approx(ours["acc_norm"]["value"])
    json.dumps(record.to_dict(), allow_nan=False)
