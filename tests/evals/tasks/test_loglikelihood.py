"""Log-likelihoods in two steps against a slow loop: every family, every shape of question, every accident."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from calib.errors import NumericalError
from evals.inference.batching import BatchSize
from evals.inference.logits import ModelLogits, Run
from evals.tasks.loglikelihood import Answer, score_requests
from evals.tasks.requests import Request, encode_pairs
from tests.support.tiny_models import FAMILIES, ODD_FAMILIES, tiny_model

CPU = torch.device("cpu")
NATS = 1e-3
CANNOT_SHARE = {"mamba", "lfm2"}
"""Families whose blocks hand something else than keys and values from one token to the next."""
Questions = list[list[Request]]


@torch.no_grad()
def slow(model: Any, questions: Sequence[Sequence[Request]]) -> list[list[Answer]]:
    """One sequence at a time, one token after the other, in float64."""
    return [[_slow(model, request) for request in question] for question in questions]


def _slow(model: Any, request: Request) -> Answer:
    logits = model(input_ids=torch.tensor([request.ids[:-1]]), use_cache=False).logits[0].double()
    total, greedy = 0.0, True
    for place in range(request.first, len(request.ids)):
        row = torch.softmax(logits[place - 1], dim=-1)
        total += float(row[request.ids[place]].log())
        greedy &= int(row.argmax()) == request.ids[place]
    return Answer(total, greedy)


def near(found: list[list[Answer]], expected: list[list[Answer]]) -> bool:
    """Whether the two are the same but for rounding; the flags exactly."""
    assert [len(question) for question in found] == [len(question) for question in expected]
    pairs = [(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)]
    assert [a.greedy for a, _ in pairs] == [b.greedy for _, b in pairs]
    assert [a.ll for a, _ in pairs] == pytest.approx([b.ll for _, b in pairs], abs=NATS, rel=1e-5)
    return True


def tokens(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 399, (count,), generator=generator).tolist()


def choices(context: Sequence[int], answers: Sequence[Sequence[int]]) -> list[Request]:
    return [Request((*context, *answer), len(context)) for answer in answers]


def shapes() -> Questions:
    """Every shape of question once."""
    same = tokens(1, 3)
    return [
        choices(tokens(2, 9), [tokens(3, 2), tokens(4, 5), tokens(5, 1), tokens(6, 3)]),
        choices(tokens(7, 31), [tokens(8, 4), tokens(9, 2)]),  # longer than the sliding windows
        choices(tokens(10, 14), [tokens(11, 1), tokens(12, 1), tokens(13, 1)]),  # needs no second pass
        choices(tokens(14, 3), [same[:1], same[:2], same]),  # each the beginning of the next
        choices(tokens(15, 6), [[*same, 7], [*same, 8, 9], same]),  # the answers begin alike
        choices(tokens(16, 12), [tokens(17, 2), tokens(17, 2)]),  # the same answer twice
        choices(tokens(18, 20), [tokens(19, 3)]),  # one answer only
        choices(tokens(20, 1), [tokens(21, 12), tokens(22, 9)]),
        [Request((*tokens(23, 8), *name, *same), 8 + len(name)) for name in ([5], [6, 7], [5, 9, 9])],  # partial
    ]


def greedy_question(model: Any) -> list[Request]:
    """What the model would write, and that with another last token."""
    ids = tokens(24, 10)
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return [Request(tuple(ids), 10), Request((*ids[:-1], (ids[-1] + 1) % 399), 10), Request(tuple(ids[:11]), 10)]


def source_of(model: Any, kind: type[ModelLogits] = ModelLogits) -> ModelLogits:
    return kind(model, torch.arange(2, 10))


def auto() -> BatchSize:
    return BatchSize("auto", CPU)


@pytest.mark.parametrize("family", [*FAMILIES, *ODD_FAMILIES])
def test_every_family_gives_what_the_slow_loop_gives(family: str) -> None:
    model = tiny_model(family)
    questions = [*shapes(), greedy_question(model)]
    source = source_of(model)
    found = score_requests(source, questions, auto())
    assert near(found, slow(model, questions))
    assert [answer.greedy for answer in found[-1]] == [True, False, True]
    whole = [note for note in source.notes if "every answer is run whole" in note]
    assert len(whole) == (family in CANNOT_SHARE), source.notes


@pytest.mark.parametrize("family", [*FAMILIES, *ODD_FAMILIES])
def test_examples_in_front_of_all_questions(family: str) -> None:
    """Tokens that all questions begin with, and a question that stands alone."""
    model = tiny_model(family)
    examples, others = tokens(30, 70), tokens(31, 66)
    questions = [_behind(examples, question) for question in shapes()]
    questions += [shapes()[0], *(_behind(others, question) for question in shapes()[:3]), shapes()[5]]
    source = source_of(model)
    assert near(score_requests(source, questions, BatchSize(5, CPU)), slow(model, questions))
    whole = [note for note in source.notes if "every answer is run whole" in note]
    assert len(whole) == (family in CANNOT_SHARE), source.notes


def _behind(start: list[int], question: list[Request]) -> list[Request]:
    return [Request((*start, *request.ids), len(start) + request.first) for request in question]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_examples_that_run_into_the_answers(family: str) -> None:
    """Everything but the answer is the same; an empty context; the same question twice."""
    model = tiny_model(family)
    start = tokens(30, 80)
    questions = [choices(start, [tokens(i, 1), tokens(i + 9, 3)]) for i in range(3)]
    questions += [questions[0], choices(start[:70], [start[70:], tokens(50, 2)]), [Request(tuple(start), 1)]]
    assert near(score_requests(source_of(model), questions, auto()), slow(model, questions))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mamba"])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_batch_does_not_matter(family: str, size: int) -> None:
    model = tiny_model(family)
    assert near(score_requests(source_of(model), shapes(), BatchSize(size, CPU)), slow(model, shapes()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_answers_with_no_token_in_common(family: str, size: int) -> None:
    """Partial contexts that begin with the name, and prompts that were cut to different lengths."""
    model = tiny_model(family)
    questions = [
        *([Request((first, *tokens(first, 5)), 2) for first in (3 + i, 30 + i, 60 + i)] for i in range(3)),
        [Request((first, *tokens(first, 1)), 1) for first in (3, 9)],
        *shapes()[:3],
    ]
    source = source_of(model)
    assert near(score_requests(source, questions, BatchSize(size, CPU)), slow(model, questions))
    assert source.notes == ()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_answers_of_very_different_lengths(family: str) -> None:
    """Too much padding for one second pass: several, each on the same prompts."""
    model = tiny_model(family)
    questions = [choices(tokens(i, 9 + i), [tokens(i + 9, n) for n in (120, 2, 60, 3)]) for i in range(3)]
    source = source_of(model, Counting)
    assert isinstance(source, Counting)
    assert near(score_requests(source, questions, auto()), slow(model, questions))
    assert len([shape for shape in source.shapes if shape[0] > 1 and shape[1] < 120]) > 2
    assert source.notes == ()


def test_equal_answers_have_equal_scores() -> None:
    """To the last bit, or rounding would decide which of them comes first."""
    model = tiny_model("llama")
    same, other = tokens(2, 8), tokens(3, 60)
    questions = [choices(tokens(i, 17), [same, other, tokens(i + 30, 8), same]) for i in range(8)]
    for size in (1, 3, 8):
        for first, _, _, last in score_requests(source_of(model), questions, BatchSize(size, CPU)):
            assert first == last


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_questions(data: st.DataObject) -> None:
    model = MODEL
    ids = st.integers(2, 5)  # few, so that beginnings are shared by accident
    sequence = st.lists(ids, min_size=2, max_size=9)
    request = sequence.flatmap(lambda s: st.integers(1, len(s) - 1).map(lambda first: Request(tuple(s), first)))
    questions = data.draw(st.lists(st.lists(request, min_size=1, max_size=4), min_size=1, max_size=5))
    assert near(score_requests(source_of(model), questions, auto()), slow(model, questions))


MODEL = tiny_model("llama")


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_questions_that_the_probe_did_not_see(family: str) -> None:
    """The short ones are of one length; only the last, long one makes a batch pad."""
    questions = [choices(tokens(i, 5), [tokens(i + 50, 2)]) for i in range(7)]
    questions += [choices(tokens(90, 14), [tokens(91, 4)]), choices(tokens(92, 9), [tokens(93, 4)])]
    model = tiny_model(family)
    assert near(score_requests(source_of(model), questions, BatchSize(9, CPU)), slow(model, questions))


def test_a_model_that_takes_no_positions_is_found_out_whatever_the_order() -> None:
    model = tiny_model("gpt2")
    inner = model.base_model.forward

    def forward(*arguments: Any, **inputs: Any) -> Any:
        if inputs.pop("position_ids", None) is not None:
            raise TypeError("got an unexpected keyword argument 'position_ids'")
        return inner(*arguments, **inputs)

    model.base_model.forward = forward
    questions = [choices(tokens(i, 5), [tokens(i + 50, 2), tokens(i + 60, 2)]) for i in range(7)]
    questions += [choices(tokens(90, 14), [tokens(91, 4), tokens(94, 2)])]
    source = source_of(model)
    assert near(score_requests(source, questions, BatchSize(9, CPU)), slow(model, questions))
    assert "every answer is run whole" in source.notes[0]


@pytest.mark.parametrize("family", ["mamba", "lfm2", "llama"])
@pytest.mark.parametrize("first", [1, 3])
def test_what_a_first_task_leaves_open_is_tried_with_the_next(family: str, first: int) -> None:
    """One answer per question, or answers of one token, never use the cache."""
    model = tiny_model(family)
    source = source_of(model)
    easy = [choices(tokens(i, 5 + i), [[7], [8], [9]][:first]) for i in range(6)]
    for questions in (easy, shapes()):
        assert near(score_requests(source, questions, auto()), slow(model, questions))


# Caches that are wrong


def _wrong_rows(cache: Any, indices: torch.Tensor) -> None:
    original_select(cache, indices.flip(0))


def _no_rows(cache: Any, indices: torch.Tensor) -> None:
    raise NotImplementedError("no selection")


original_select = DynamicCache.batch_select_indices


@pytest.mark.parametrize(("wrong", "reason"), [(_wrong_rows, "nats per token"), (_no_rows, "NotImplementedError")])
def test_a_cache_that_is_wrong_is_found_out(
    wrong: Callable[..., None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DynamicCache, "batch_select_indices", wrong)
    model = tiny_model("llama")
    source = source_of(model)
    assert near(score_requests(source, shapes(), auto()), slow(model, shapes()))
    (note,) = source.notes
    assert note.startswith("LlamaForCausalLM: every answer is run whole, prompts are not shared (")
    assert reason in note
    score_requests(source, shapes(), auto())
    assert source.notes == (note,)  # said once


def test_positions_that_are_ignored_are_found_out() -> None:
    model = tiny_model("gpt2")  # learned positions: the padding on the left would be counted
    inner = model.base_model.forward
    model.base_model.forward = lambda *arguments, position_ids=None, **inputs: inner(*arguments, **inputs)
    source = source_of(model)
    assert near(score_requests(source, shapes(), auto()), slow(model, shapes()))
    assert "in two steps they differ by" in source.notes[0]


# How much is run


class Counting(ModelLogits):
    """Remembers the shape of everything that is run."""

    def __init__(self, model: Any, probe: torch.Tensor) -> None:
        super().__init__(model, probe)
        self.shapes: list[tuple[int, ...]] = []

    def run(self, ids: torch.Tensor, **inputs: Any) -> Run:
        self.shapes.append(tuple(ids.shape))
        return super().run(ids, **inputs)


def runs_of(questions: Questions) -> list[tuple[int, ...]]:
    source = source_of(MODEL, Counting)
    assert isinstance(source, Counting)
    source.two_steps = True  # as if it had been tried already
    score_requests(source, questions, auto())
    return source.shapes


def test_the_prompt_is_run_once() -> None:
    question = choices(tokens(1, 20), [tokens(2, 3), tokens(3, 4), tokens(4, 1)])
    # The last token of an answer is never read, so the third answer needs nothing but the prompt.
    assert runs_of([question]) == [(1, 20), (2, 3)]


def test_examples_are_run_once() -> None:
    questions = [_behind(tokens(30, 70), choices(tokens(i, 8), [[5], [6]])) for i in range(4)]
    assert runs_of(questions) == [(1, 70), (4, 8)]


def test_answers_of_one_token_need_no_second_pass() -> None:
    questions = [choices(tokens(i, 8), [[5], [6], [7]]) for i in range(4)]
    assert runs_of(questions) == [(4, 8)]


# Numbers


def test_scores_that_are_not_finite_name_question_and_answer() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.get_output_embeddings().weight.data[77] = float("nan")
    questions = [choices(tokens(i, 5), [[9, 8], [77, 8]]) for i in range(2)]
    with pytest.raises(NumericalError, match=r"the score of answer \d to question \d is nan: .*--dtype float32"):
        score_requests(source_of(model), questions, auto())


def test_half_precision_is_shared_and_near() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    source = source_of(model)
    found = score_requests(source, shapes(), auto())
    assert source.notes == ()
    for question, expected in zip(found, slow(model, shapes()), strict=True):
        assert [a.ll for a in question] == pytest.approx([b.ll for b in expected], rel=0.03, abs=0.3)


def test_progress_counts_questions() -> None:
    done: list[int] = []
    score_requests(source_of(MODEL), shapes(), BatchSize(4, CPU), done.append)
    assert done == [4, 8, 9]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_long_prompts_are_cut_as_the_harness_cuts_them(tiny_tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's, at import
        pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
        from lm_eval.models.huggingface import HFLM

    context = 16
    model = tiny_model("gpt2", vocab_size=len(tiny_tokenizer), n_positions=context)
    pairs = [("The quick brown fox " * count, text) for count in (0, 1, 2, 3, 9) for text in ("", " jumps", "over it")]
    pairs = [pair for pair in pairs if pair[1]]
    questions = [[request] for request in encode_pairs(pairs, tiny_tokenizer, context)]
    assert any(question[0].cut for question in questions)
    questions = [questions[i] + questions[i + 1] for i in range(0, len(questions), 2)]  # two answers a question
    found = [a for question in score_requests(source_of(model), questions, auto()) for a in question]
    wrapped = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=2, max_length=context)
    theirs = wrapped.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    assert [a.ll for a in found] == pytest.approx([ll for ll, _ in theirs], abs=NATS)
    assert [a.greedy for a in found] == [bool(greedy) for _, greedy in theirs]
