"""Blocks of codes: golden bytes, the slow layout bit by bit, what a kernel's byte permutation reads, every width."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq.grids.codebooks import ITQ3_MAGNITUDES
from ptq.grids.sub_block_scales import SubBlockLayout
from ptq.number_formats.rotated.block_codes import block_words, pack_blocks, row_words, unpack_blocks

SMALL = SubBlockLayout(256, 32, (15, 12, 10, 8), ITQ3_MAGNITUDES, 0.2545)
FINE = SubBlockLayout(256, 16, (15, 13, 12, 10, 9, 8, 7, 6), ITQ3_MAGNITUDES, 0.2545)
LEVELS = (-8, -5, -3, -1, 1, 3, 5, 8)


def random_row(layout: SubBlockLayout, width: int, seed: int = 0, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 8, (rows, width), generator=generator, dtype=torch.uint8)
    scale = torch.randint(-(2**15), 2**15, (rows, layout.blocks(width)), generator=generator).to(torch.int16)
    index = torch.randint(0, len(layout.multipliers), (rows, layout.subs(width)), generator=generator)
    return codes, scale.view(torch.float16), index.to(torch.uint8)


def slow_words(codes: list[int], scale_bits: int, index: list[int]) -> list[int]:
    """One block of 256 with 2-bit multipliers, a bit at a time."""
    words = [0] * 25
    words[0] = scale_bits | sum(r << (16 + 2 * j) for j, r in enumerate(index))
    for i, code in enumerate(codes):
        level = LEVELS[code]
        magnitude = (1, 3, 5, 8).index(abs(level))
        words[1 + i // 16] |= magnitude << (4 * (i % 8) + 2 * (i % 16 // 8))
        words[17 + i // 32] |= (level < 0) << (4 * (i % 8) + i % 32 // 8)
    return words


def test_a_block_agrees_with_the_layout_bit_by_bit() -> None:
    codes, scale, index = random_row(SMALL, 512)
    packed = pack_blocks(codes, scale, index, SMALL)
    assert packed.shape == (3, 50)
    for row in range(3):
        for block in range(2):
            expected = slow_words(
                codes[row, 256 * block :][:256].tolist(),
                int(scale.view(torch.int16)[row, block]) & 0xFFFF,
                index[row, 8 * block :][:8].tolist(),
            )
            assert [word & 0xFFFFFFFF for word in packed[row, 25 * block :][:25].tolist()] == expected


def test_golden_bytes() -> None:
    digests = []
    for layout, size in ((SMALL, 100), (FINE, 104)):
        codes = (torch.arange(256) * 5 % 8).to(torch.uint8)[None]
        index = (torch.arange(layout.subs(256)) * 3 % len(layout.multipliers)).to(torch.uint8)[None]
        packed = pack_blocks(codes, torch.tensor([[0.001953125]], dtype=torch.float16), index, layout)
        data = packed.numpy().tobytes()
        assert len(data) == size
        digests.append(hashlib.sha256(data).hexdigest()[:16])
    assert digests == GOLDEN


GOLDEN = ["38f77c7b0a5ee42f", "4a4b1db0372c9f25"]


def test_a_byte_permutation_decodes_eight_codes_at_a_time() -> None:
    """What a GPU kernel does: selectors of nibbles from both planes, looked up in two constants of four bytes."""
    codes, scale, index = random_row(SMALL, 256, rows=1)
    words = [word & 0xFFFFFFFF for word in pack_blocks(codes, scale, index, SMALL)[0].tolist()]
    table = [1, 3, 5, 8, -1, -3, -5, -8]
    for group in range(32):
        sub, g = divmod(group, 4)
        low, signs = words[1 + 2 * sub + g // 2], words[17 + sub]
        shifted = signs << (2 - g) if g <= 2 else signs >> (g - 2)
        selector = ((low >> 2 * (g % 2)) & 0x33333333) | (shifted & 0x44444444)
        found = [table[(selector >> 4 * n) & 7] for n in range(8)]
        assert found == [LEVELS[code] for code in codes[0, 8 * group :][:8].tolist()]


@pytest.mark.parametrize("layout", [SMALL, FINE], ids=["100", "104"])
@given(width=st.integers(1, 600), seed=st.integers(0, 9))
def test_unpacking_is_the_inverse(layout: SubBlockLayout, width: int, seed: int) -> None:
    codes, scale, index = random_row(layout, width, seed)
    packed = pack_blocks(codes, scale, index, layout)
    assert packed.shape == (3, row_words(layout, width))
    found = unpack_blocks(packed, layout, width)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1].view(torch.int16), scale.view(torch.int16))
    assert torch.equal(found[2], index)


def test_short_blocks_are_not_padded_to_whole_ones() -> None:
    assert [block_words(SMALL, n) for n in (256, 64, 32, 17, 1)] == [25, 7, 4, 4, 3]
    assert row_words(SMALL, 576) == 2 * 25 + 7


def test_what_does_not_exist_is_refused() -> None:
    codes, scale, index = random_row(SMALL, 256)
    with pytest.raises(ValueError, match="a code of 8 in a codebook of 8 levels"):
        pack_blocks(torch.full_like(codes, 8), scale, index, SMALL)
    with pytest.raises(ValueError, match="a multiplier of 4, there are 4"):
        pack_blocks(codes, scale, torch.full_like(index, 4), SMALL)
    with pytest.raises(ValueError, match="256 codes take int32 rows of 25 words"):
        unpack_blocks(torch.zeros(3, 24, dtype=torch.int32), SMALL, 256)
