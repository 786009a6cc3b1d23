"""Hidden states come back as the same bits wherever they were kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import calib.runner.activation_store as streams_module
from calib.errors import OutputError, UsageError
from calib.runner.activation_store import ActivationStore, OffloadTarget, settle_offload

CPU = torch.device("cpu")


@pytest.mark.parametrize("target", ["none", "memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_come_back_in_any_order_and_after_writing(
    target: OffloadTarget, dtype: torch.dtype, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 5, 7, generator=generator).to(dtype) for _ in range(4)]
    stream = ActivationStore(CPU, target, tmp_path / "x")
    for batch in batches:
        stream.append(batch, (3, 5))
    assert len(stream) == 4
    assert stream.tokens == 60
    assert stream.width == 7
    for index in (0, 1, 2, 3, 0, 2, 1):
        assert torch.equal(stream[index], batches[index])
    for index in range(4):  # the next one is on its way while this one is replaced
        stream[index] = stream[index] * 2
        batches[index] = batches[index] * 2
    stream[1] = batches[0]  # the one that was fetched ahead
    assert torch.equal(stream[1], batches[0])
    assert torch.equal(stream[3], batches[3])
    stream.close()
    assert not (tmp_path / "x").exists()


def test_auto_takes_the_first_place_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 1000, "cuda": 100}
    monkeypatch.setattr(streams_module, "free_memory", lambda device: free[device.type])
    cuda = torch.device("cuda")
    assert [settle_offload("auto", size, CPU) for size in (350, 351)] == ["none", "disk"]
    assert [settle_offload("auto", size, cuda) for size in (35, 36, 350, 351)] == ["none", "memory", "memory", "disk"]
    assert settle_offload("memory", 1, CPU) == "none"
    assert settle_offload("disk", 1, CPU) == "disk"
    with pytest.raises(UsageError, match="disk"):
        settle_offload("disc", 1, CPU)  # type: ignore[arg-type]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    stream = ActivationStore(CPU, "disk", tmp_path / "x")
    (tmp_path / "x").rmdir()
    with pytest.raises(OutputError, match="cannot keep activations"):
        stream.append(torch.zeros(1, 2, 3), (1, 2))
    with pytest.raises(UsageError, match="folder"):
        ActivationStore(CPU, "disk")
