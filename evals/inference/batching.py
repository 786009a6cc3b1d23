"""How much is computed at once: batches of alike lengths, halved when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from accelerate.utils.memory import should_reduce_batch_size

from calib.errors import UsageError

__all__ = ["BatchSize", "is_out_of_memory", "run_batches"]

# Tokens of a batch by itself, and the padding it may hold before it is closed, as a part of them. More tokens do not
# make a CPU faster, and padding costs it as much as tokens; an accelerator waits for the number of batches.
# Padding costs a mask as well: a batch that has enough tokens for a CPU to be fast takes no more of other lengths.
_TOKENS, _WASTE, _ENOUGH = {"cpu": 4096}, {"cpu": 0.25}, {"cpu": 768}
_DEVICE_TOKENS, _DEVICE_WASTE = 32768, 1.0
_AHEAD = 8192  # sequences looked at for one batch


class BatchSize:
    """Sequences in a batch: a fixed number, or as many as a number of tokens allows; both shrink by halves.

    Args:
        size: a number, or ``"auto"``.
        device: where the model is; decides the tokens of ``auto``.

    Raises:
        UsageError: neither a positive number nor ``auto``.
    """

    def __init__(self, size: int | str, device: torch.device) -> None:
        fixed = int(size) if str(size).isdecimal() else None
        if size != "auto" and (fixed is None or fixed < 1):
            raise UsageError(f"the batch size must be a number of at least 1 or 'auto', got {size!r}.")
        self._fixed = fixed
        self._tokens = _TOKENS.get(device.type, _DEVICE_TOKENS)
        self._waste = _WASTE.get(device.type, _DEVICE_WASTE)
        self._enough = _ENOUGH.get(device.type, self._tokens)
        self.notes: list[str] = []

    def take(self, lengths: Sequence[int], costs: Sequence[int]) -> int:
        """How many of the next sequences go into one batch.

        Args:
            lengths: what each is padded by, sorted from long to short.
            costs: tokens that each brings.
        """
        if self._fixed is not None:
            return min(self._fixed, len(lengths))
        tokens = real = 0
        for count, (length, cost) in enumerate(zip(lengths, costs, strict=True)):
            tokens, real = tokens + cost, real + length
            padding = (count + 1) * lengths[0] - real
            full = tokens > self._tokens or padding > self._waste * tokens
            if count and (full or (length < lengths[count - 1] and tokens - cost >= self._enough)):
                return count
        return len(lengths)

    def halve(self, count: int, tokens: int) -> None:
        """Remember that ``count`` sequences of ``tokens`` together were too many."""
        if self._fixed is not None:
            self._fixed = max(1, count // 2)
        self._tokens = max(1, tokens // 2)
        self.notes.append(f"out of memory with a batch of {count} ({tokens} tokens): went on with half of it")


def run_batches(
    lengths: Sequence[int],
    work: Callable[[list[int]], None],
    size: BatchSize,
    progress: Callable[[int], None] | None = None,
    *,
    costs: Sequence[int] | None = None,
) -> None:
    """Call ``work`` with batches of indices, long sequences first, so that memory runs out early or not at all.

    Args:
        lengths: what each sequence is padded by, in tokens.
        work: computes the sequences of these indices and stores what it finds; called again with fewer of them if it
            runs out of memory.
        size: shared by all calls, so that a halving lasts.
        progress: called with the number of sequences done.
        costs: tokens that each sequence brings; ``None`` for ``lengths``.
    """
    weights = lengths if costs is None else costs
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], -weights[index]))
    done = 0
    while done < len(order):
        ahead = order[done : done + _AHEAD]
        count = size.take([lengths[i] for i in ahead], [weights[i] for i in ahead])
        batch = ahead[:count]
        if not _fits(work, batch):
            size.halve(count, sum(weights[i] for i in batch))
            continue
        done += count
        if progress is not None:
            progress(done)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on whatever device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)


def _fits(work: Callable[[list[int]], None], batch: list[int]) -> bool:
    """Whether the batch could be computed; a single sequence that does not fit is an error."""
    try:
        work(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(batch) == 1:
            raise
    else:
        return True
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
