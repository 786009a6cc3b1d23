"""Packing: golden words for every width, an independent slow formula, round trips, compressed-tensors' own packer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.packing import bits as packing
from ptq.packing.bits import pack_rows, packed_width, unpack_rows

GOLDEN = json.loads((Path(__file__).parent / "data" / "packing_golden.json").read_text())
WIDTHS = range(1, 9)


def random_codes(rows: int, n: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8)


def slow_pack(codes: list[int], bits: int) -> bytes:
    """One big whole number: code i times 2^(i*bits); its little-endian bytes, filled up to whole words."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes(4 * packed_width(len(codes), bits), "little")


@pytest.mark.parametrize("bits", WIDTHS)
def test_golden_words(bits: int) -> None:
    row = GOLDEN[str(bits)]
    packed = pack_rows(torch.tensor([row["codes"]], dtype=torch.uint8), bits)
    assert packed.numpy().astype("<i4").tobytes().hex() == row["bytes"]
    assert unpack_rows(packed, bits, len(row["codes"])).tolist() == [row["codes"]]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(0, 5), n=st.integers(1, 140), seed=st.integers(0, 1000))
def test_equals_the_slow_formula_and_round_trips(bits: int, rows: int, n: int, seed: int) -> None:
    codes = random_codes(rows, n, bits, seed)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, packed_width(n, bits))
    assert [row.tobytes() for row in packed.numpy()] == [slow_pack(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_rows(packed, bits, n), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [64, 96, 72])
def test_same_bytes_as_compressed_tensors(bits: int, n: int) -> None:
    codes = random_codes(7, n, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert torch.equal(pack_rows(codes, bits), theirs)
    assert torch.equal(
        unpack_rows(theirs, bits, n).int() - 2 ** (bits - 1), unpack_from_int32(theirs, bits, codes.shape)
    )


@pytest.mark.parametrize("bits", [3, 8])
def test_chunks_of_rows_do_not_show(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(11, 40, bits)
    whole = pack_rows(codes, bits)
    monkeypatch.setattr(packing, "CPU_CHUNK", 3 * 40)
    assert torch.equal(pack_rows(codes, bits), whole)
    assert torch.equal(unpack_rows(whole, bits, 40), codes)


def test_strided_inputs_are_read_right() -> None:
    codes = random_codes(40, 24, 5)
    packed = pack_rows(codes.T, 5)
    assert torch.equal(packed, pack_rows(codes.T.contiguous(), 5))
    assert torch.equal(unpack_rows(packed.T.contiguous().T, 5, 40), codes.T)


def test_three_bits_cost_three_bits() -> None:
    assert packed_width(576, 3) * 32 == 576 * 3


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: pack_rows(torch.full((1, 4), 8, dtype=torch.uint8), 3), "code of 8 does not fit in 3 bits"),
        (lambda: pack_rows(torch.zeros(1, 4, dtype=torch.uint8), 9), "1 to 8 bits"),
        (lambda: pack_rows(torch.zeros(4, dtype=torch.uint8), 3), "uint8 matrix"),
        (lambda: unpack_rows(torch.zeros(1, 4, dtype=torch.int64), 3, 32), "int32 matrix"),
        (lambda: unpack_rows(torch.zeros(1, 4, dtype=torch.int32), 3, 32), "take 3 words a row, got 4"),
    ],
)
def test_wrong_input_is_refused(call: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()  # type: ignore[operator]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", WIDTHS)
def test_cuda_gives_the_same_words(bits: int) -> None:
    codes = random_codes(9, 77, bits)
    packed = pack_rows(codes.cuda(), bits)
    assert np.array_equal(packed.cpu().numpy(), pack_rows(codes, bits).numpy())
    assert torch.equal(unpack_rows(packed, bits, 77).cpu(), codes)


@pytest.mark.parametrize("out", range(1, 11))
@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_of_few_rows_come_back(out: int, bits: int) -> None:
    from ptq.number_formats.integer import unpack_zeros

    zeros = torch.randint(0, 2**bits, (out, 3), generator=torch.Generator().manual_seed(out)).to(torch.uint8)
    packed = pack_rows(zeros.T.contiguous(), bits).T.contiguous()
    assert torch.equal(unpack_zeros(packed, bits, out), zeros)
