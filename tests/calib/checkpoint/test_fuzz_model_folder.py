"""Damaged and hostile model folders: the model opens, or a `PtqError` says why not. No other end, and no large memory.

Every example changes a valid folder at one place. What is opened is loaded too, since a header can be wrong in ways
that only the reading of a tensor shows.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calib.checkpoint.reader import open_model
from calib.errors import PtqError
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and measures memory through /proc")

Folder = dict[str, bytes]
SECONDS, MEGABYTES = 20, 64
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """A valid folder in one file, and one in shards, as bytes by file name."""
    found = {}
    for name, size in (("single", "1GB"), ("sharded", "60KB")):
        path = tmp_path_factory.mktemp(name)
        model = tiny_model("llama", hidden_size=16, intermediate_size=24, vocab_size=32)
        model.save_pretrained(path, max_shard_size=size if name == "single" else "5KB")
        found[name] = {file.name: file.read_bytes() for file in path.iterdir()}
    for name in found:
        assert opens(found[name]), "the folders are valid before they are changed"
    assert INDEX in found["sharded"]
    return found


def opens(folder: Folder) -> bool:
    """Write, open and load a folder: ``True`` if that works, ``False`` if it is refused on purpose."""
    with tempfile.TemporaryDirectory() as place, limits():
        for name, content in folder.items():
            (Path(place) / name).write_bytes(content)
        try:
            source = open_model(place)
            source.load(source.tensor_names())
        except PtqError:
            return False
        return True


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Fail where an example takes more than `SECONDS`, or makes the process grow by more than `MEGABYTES`.

    The limit of the address space keeps a failure from taking the machine with it.
    """

    def stop(*_: object) -> None:
        pytest.fail(f"more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    before, space = peak_megabytes(reset=True), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), space[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, space)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert peak_megabytes() - before < MEGABYTES


def peak_megabytes(reset: bool = False) -> float:
    """Largest resident size of this process (since the last reset)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 3, 17, 2**31, 10**12, 2**63, 10**400, 0.5, 1e300, float("inf"), float("nan")]),
    st.sampled_from(
        ["", "x", "../x", "/etc/passwd", "kernels-community/x", "gpt2", "bert", "float32", "load", "\0", "é"]
    ),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def dumped(data: Any) -> bytes:
    return json.dumps(data).encode()


@given(st.data())
@FUZZ
def test_configs(folders: dict[str, Folder], data: st.DataObject) -> None:
    folder = folders["single"]
    config = json.loads(folder["config.json"])
    more = ["auto_map", "torch_dtype", "quantization_config", "text_config", "tie_word_embeddings", "num_experts"]
    more += ["attn_implementation", "layer_types", "per_layer_config", "get_text_config", "_name_or_path"]
    for key in data.draw(st.lists(st.sampled_from(sorted(config) + more), min_size=1, max_size=2)):
        if data.draw(st.integers(0, 5)) == 0:
            config.pop(key, None)
        else:
            config[key] = data.draw(VALUES)
    opens(folder | {"config.json": dumped(config)})


@given(st.data())
@FUZZ
def test_indexes(folders: dict[str, Folder], data: st.DataObject) -> None:
    folder = folders["sharded"]
    index = json.loads(folder[INDEX])
    files = sorted(set(index["weight_map"].values()))
    name = data.draw(st.sampled_from(sorted(index["weight_map"])))
    kind = data.draw(st.sampled_from(["value", "other file", "key", "drop", "metadata", "map"]))
    if kind == "value":
        index["weight_map"][name] = data.draw(VALUES)
    elif kind == "other file":
        index["weight_map"][name] = data.draw(st.sampled_from(files))
    elif kind == "key":
        index["weight_map"][data.draw(st.text(max_size=8))] = index["weight_map"].pop(name)
    elif kind == "drop":
        del index["weight_map"][name]
    else:
        index["metadata" if kind == "metadata" else "weight_map"] = data.draw(VALUES)
    opens(folder | {INDEX: dumped(index)})


@given(st.data())
@FUZZ
def test_headers(folders: dict[str, Folder], data: st.DataObject) -> None:
    folder = folders["single"]
    file = folder["model.safetensors"]
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    kind = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "entry", "name", "swap", "drop"]))
    sizes = st.lists(st.sampled_from([-1, 0, 1, 2, 16, 32, 512, 1024, 2**62, 2**64]), max_size=4)
    if kind == "name":
        header[data.draw(st.text(max_size=8))] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "entry":
        header[name] = data.draw(VALUES)
    elif kind == "swap":
        other = data.draw(st.sampled_from(sorted(header)))
        header[name], header[other] = header[other], header[name]
    elif kind == "dtype":
        header[name]["dtype"] = data.draw(st.sampled_from(["BF16", "F64", "I32", "F8_E4M3", "F4", "?"]) | VALUES)
    else:
        header[name][kind] = data.draw(sizes | VALUES)
    text = dumped(header)
    opens(folder | {"model.safetensors": len(text).to_bytes(8, "little") + text + file[8 + length :]})


@given(st.data())
@FUZZ
def test_bytes(folders: dict[str, Folder], data: st.DataObject) -> None:
    folder = dict(folders[data.draw(st.sampled_from(["single", "sharded"]))])
    name = data.draw(st.sampled_from([name for name in sorted(folder) if name != "generation_config.json"]))
    content = bytearray(folder[name])
    kind = data.draw(st.sampled_from(["cut", "extend", "flip", "replace", "remove", "empty"]))
    if kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "extend":
        content += data.draw(st.binary(min_size=1, max_size=64))
    elif kind == "flip":  # mostly where the header lies
        at = data.draw(st.lists(st.integers(0, min(len(content), 1200) - 1), min_size=1, max_size=4))
        for position in at:
            content[position] = data.draw(st.integers(0, 255))
    elif kind == "replace":
        content = bytearray(data.draw(st.binary(max_size=200)))
    if kind == "remove":
        del folder[name]
    else:
        folder[name] = b"" if kind == "empty" else bytes(content)
    opens(folder)
