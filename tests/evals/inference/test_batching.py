"""Batches: every sequence once, long ones first, little padding, and halves when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import UsageError
from evals.inference import batching
from evals.inference.batching import BatchSize, run_batches

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # naming a device needs none
SIZES: st.SearchStrategy[int | str] = st.integers(1, 9) | st.just("auto")
LENGTHS = st.lists(st.integers(1, 3000), max_size=60)


@pytest.fixture(autouse=True, scope="module")
def _no_collection() -> Iterator[None]:
    """A collection of everything that the tests have imported takes a sixth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "gc", SimpleNamespace(collect=lambda: 0))
        yield


def batches(lengths: list[int], size: BatchSize, costs: list[int] | None = None) -> list[list[int]]:
    found: list[list[int]] = []
    run_batches(lengths, lambda batch: found.append(list(batch)), size, costs=costs)
    return found


@given(LENGTHS, SIZES, st.sampled_from([CPU, CUDA]))
def test_every_sequence_once_and_long_ones_first(lengths: list[int], size: int | str, device: torch.device) -> None:
    found = batches(lengths, BatchSize(size, device))
    order = [index for batch in found for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    assert all(batch for batch in found)


def test_equal_lengths_keep_their_order_and_costs_decide_between_them() -> None:
    assert batches([5, 5, 7, 5], BatchSize(2, CPU)) == [[2, 0], [1, 3]]
    assert batches([5, 5, 7, 5], BatchSize(2, CPU), [1, 9, 1, 5]) == [[2, 1], [3, 0]]


@given(LENGTHS, st.integers(1, 9))
def test_a_fixed_size_fills_every_batch_but_the_last(lengths: list[int], size: int) -> None:
    counts = [len(batch) for batch in batches(lengths, BatchSize(size, CPU))]
    assert counts == [size] * (len(lengths) // size) + ([len(lengths) % size] if len(lengths) % size else [])


@given(LENGTHS, st.sampled_from([CPU, CUDA]), st.integers(1, 4))
def test_auto_fills_a_batch_up_to_its_limits(lengths: list[int], device: torch.device, times: int) -> None:
    most, waste, enough = (4096, 0.25, 768) if device == CPU else (32768, 1.0, 32768)
    costs = [times * length for length in lengths]

    def fits(batch: list[int]) -> bool:
        tokens = sum(costs[index] for index in batch)
        longest = max(lengths[index] for index in batch)
        padding = sum(longest - lengths[index] for index in batch)
        shorter = lengths[batch[-1]] < lengths[batch[-2]] and tokens - costs[batch[-1]] >= enough
        return tokens <= most and padding <= waste * tokens and not shorter

    found = batches(lengths, BatchSize("auto", device), costs)
    for batch, following in zip(found, (*found[1:], []), strict=False):
        assert all(fits(batch[: count + 1]) for count in range(1, len(batch)))
        assert not following or not fits([*batch, following[0]])


def test_auto_by_example() -> None:
    assert [len(batch) for batch in batches([128] * 70, BatchSize("auto", CPU))] == [32, 32, 6]
    assert [len(batch) for batch in batches([128] * 300, BatchSize("auto", CUDA))] == [256, 44]
    assert batches([100, 59], BatchSize("auto", CPU)) == [[0], [1]]  # 41 of padding for 159 tokens
    assert batches([100, 60], BatchSize("auto", CPU)) == [[0, 1]]
    assert batches([100, 59], BatchSize("auto", CUDA)) == [[0, 1]]
    assert batches([400, 399, 398], BatchSize("auto", CPU)) == [[0, 1], [2]]  # 799 are enough to be fast
    assert batches([400, 400, 400], BatchSize("auto", CPU)) == [[0, 1, 2]]  # of one length, more cost no padding
    assert batches([400, 399, 398], BatchSize("auto", CUDA)) == [[0, 1, 2]]
    assert batches([5000, 5000], BatchSize("auto", CPU)) == [[0], [1]]  # too long, but there is no other way
    assert batches([], BatchSize("auto", CPU)) == []


def test_many_short_sequences() -> None:
    found = batches([1] * 20_000, BatchSize("auto", CPU))
    assert [len(batch) for batch in found[:-1]] == [4096] * (len(found) - 1)
    assert sum(map(len, found)) == 20_000


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    MemoryError(),
]


class Limited:
    """Memory for so many tokens."""

    def __init__(self, lengths: list[int], most: int, error: Exception = OUT_OF_MEMORY[0]) -> None:
        self.lengths, self.most, self.error = lengths, most, error
        self.done: list[list[int]] = []
        self.failed: list[list[int]] = []

    def __call__(self, batch: list[int]) -> None:
        if sum(self.lengths[index] for index in batch) > self.most:
            self.failed.append(list(batch))
            assert len(self.failed) < 100, "it never gets smaller"
            raise self.error
        self.done.append(list(batch))


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("size", [8, "auto"])
def test_out_of_memory_halves_the_batch_and_says_so(error: Exception, size: int | str) -> None:
    lengths = [100] * 20
    work, batch_size = Limited(lengths, 450, error), BatchSize(size, CPU)
    run_batches(lengths, work, batch_size)
    counts = [8, 4, 4, 4, 4, 4] if size == 8 else [20, 10, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    failures = 1 if size == 8 else 3
    assert list(map(len, work.failed)) == counts[:failures]
    assert list(map(len, work.done)) == counts[failures:]
    assert batch_size.notes == [
        f"out of memory with a batch of {count} ({100 * count} tokens): went on with half of it"
        for count in counts[:failures]
    ]


@given(LENGTHS, SIZES, st.integers(3000, 9000), st.integers(1, 3))
def test_whatever_the_memory_every_sequence_is_computed_once(
    lengths: list[int], size: int | str, most: int, times: int
) -> None:
    costs = [times * length for length in lengths]
    work, batch_size = Limited(lengths, most), BatchSize(size, CUDA)
    steps: list[int] = []
    run_batches(lengths, work, batch_size, steps.append, costs=costs)
    assert sorted(index for batch in work.done for index in batch) == list(range(len(lengths)))
    assert len(batch_size.notes) == len(work.failed) <= 16
    assert steps == [sum(map(len, work.done[: place + 1])) for place in range(len(work.done))]


def test_a_halving_lasts() -> None:
    lengths = [10] * 16
    for size in (BatchSize(16, CPU), BatchSize("auto", CPU)):
        first, second = Limited(lengths, 40), Limited(lengths, 40)
        run_batches(lengths, first, size)
        run_batches(lengths, second, size)
        assert len(first.failed) == 2
        assert second.failed == []
        assert list(map(len, second.done)) == [4, 4, 4, 4]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_one_sequence_that_does_not_fit_is_an_error(error: Exception) -> None:
    lengths = [10, 60, 10]
    work, size = Limited(lengths, 50, error), BatchSize(3, CPU)
    with pytest.raises(type(error)) as caught:
        run_batches(lengths, work, size)
    assert caught.value is error
    assert work.failed == [[1, 0, 2], [1]]
    assert work.done == []


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x"), KeyError()]
)
def test_other_errors_pass_at_once(error: Exception) -> None:
    size = BatchSize(4, CPU)
    work = Limited([10] * 8, 5, error)
    with pytest.raises(type(error)) as caught:
        run_batches([10] * 8, work, size)
    assert caught.value is error
    assert len(work.failed) == 1
    assert size.notes == []


@pytest.mark.parametrize("size", [0, -1, "0", "-3", "many", "", "2.5", "²", True, None])
def test_sizes_that_are_none(size: object) -> None:
    with pytest.raises(UsageError, match="must be a number of at least 1 or 'auto', got"):
        BatchSize(size, CPU)  # type: ignore[arg-type]


def test_sizes_in_words() -> None:
    assert list(map(len, batches([1] * 5, BatchSize("2", CPU)))) == [2, 2, 1]
