"""A small model of the structure of a large one, written as its output will be written.

A model that is small itself is its own skeleton. Of others, a prefix of the blocks that has one of every kind is built
with small widths (`ptq.proof.shrink`). What makes it a skeleton is checked, not assumed: the names of its tensors, the
classes of their modules and the schemes of its linears must be those of the large model, block for block.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from calib.checkpoint.reader import ModelSource, ModuleSource, open_model, quiet_transformers
from calib.model.experts import expert_linears
from calib.model.structure import all_linears, find_blocks, find_linears, is_linear, linear_weight, set_linear_weight
from ptq.containers.select import CONTAINERS
from ptq.errors import UsageError
from ptq.proof.loader import run_model
from ptq.proof.shrink import shrink_config
from ptq.quantized import QuantizedWeight
from ptq.scheme import KeyValueScheme, Scheme

__all__ = ["Skeleton", "make_skeleton"]

_SMALL_MODEL = 1 << 22
"""Parameters of a model that needs no smaller one."""
_LARGEST_SKELETON = 1 << 26
_TOKENS = 8
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A small full-precision model, opened like the large one.

    Args:
        folder: where it is stored in full precision.
        source: the model, its weights loaded.
        schemes: of its linears by full name; ``None`` for those that are not called.
        shrunk: whether it is smaller than the model it stands for.
        tokens: a batch to run it on.
        runs: whether it runs on them at all.
    """

    folder: Path
    source: ModelSource
    schemes: Mapping[str, Scheme | None]
    shrunk: bool
    tokens: list[list[int]]
    runs: bool

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return len(find_blocks(self.source.skeleton))

    @property
    def linears(self) -> dict[str, nn.Module]:
        """All linears by full name, also those that cannot be quantized: a format lists them as dense."""
        return all_linears(self.source.skeleton)

    def write(self, form: str, folder: Path, key_values: KeyValueScheme | None) -> Path | None:
        """Write the packed form.

        Args:
            form: ``compressed-tensors`` or ``native``.
            folder: a new folder.
            key_values: how keys and values are rounded at run time.

        Returns:
            A file with the logits that the folder should give, if that can be said without the runtime.
        """
        container = CONTAINERS[form]
        folder.mkdir()
        weights = {name: _draw(self.linears[name], scheme, index) for index, (name, scheme) in enumerate(self._packed)}
        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            tensors.update(container.layer_tensors(name, weight))
        dense = self.source.tensor_names() - {f"{name}.weight" for name in weights}
        tensors.update({key: tensor.contiguous() for key, _, tensor in self.source.raw_tensors(dense)})
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        quantization = container.quantization_config(self.schemes, self.linears, key_values=key_values)
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = quantization
        config |= container.config_entries()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for code in self.folder.glob("*.py"):
            shutil.copy(code, folder)
        transformed = key_values is not None or any(scheme.transforms_input for _, scheme in self._packed)
        if transformed or not self.runs:
            return None
        # The stock loader unpacks to the model's dtype, and ours computes with values in the dtype of the activations.
        dtype = self.source.dtype if form == "compressed-tensors" else torch.float32
        logits = self._logits({name: weight.dequantize(dtype) for name, weight in weights.items()})
        save_file({"logits": logits}, folder / "expected.safetensors")
        return folder / "expected.safetensors"

    @property
    def _packed(self) -> list[tuple[str, Scheme]]:
        return [(name, scheme) for name, scheme in self.schemes.items() if scheme is not None]

    def _logits(self, values: Mapping[str, Tensor]) -> Tensor:
        """Logits of a float32 pass with these weights ``[out, in]`` in the linears."""
        model: Any = copy.deepcopy(self.source.skeleton)
        model.float()
        for name, value in values.items():
            set_linear_weight(model.get_submodule(name), value.float())
        logits: Tensor = run_model(model, self.tokens)
        return logits.contiguous()


def make_skeleton(
    source: ModelSource, schemes: Mapping[str, Scheme | None], folder: Path, *, trust_remote_code: bool = False
) -> Skeleton | str:
    """Build a skeleton with random weights.

    Args:
        source: the model.
        schemes: of all linears in its blocks by full name.
        folder: a new folder.
        trust_remote_code: run modelling code that ships with the model.

    Returns:
        The skeleton, or in one line why there is none.
    """
    model: Any = source.skeleton
    whole = {**model.config.to_dict(), **source.config_changes}
    size = sum(parameter.numel() for parameter in model.parameters())
    blocks = find_blocks(model)
    kinds = [_kind(model, schemes, block) for block in blocks]
    prefix = 1 + max(kinds.index(kind) for kind in kinds)
    attempts = [(len(blocks), False)] if size <= _SMALL_MODEL else [(prefix, True), (len(blocks), True)]
    problem = ""
    for kept, widths in attempts:
        config = shrink_config(whole, len(blocks), kept, widths=widths)
        try:
            with quiet_transformers():
                return _build(source, schemes, kinds[:kept], config, folder, widths, trust_remote_code)
        except Exception as error:  # whatever modelling code says to sizes that it was not made for
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
            shutil.rmtree(folder, ignore_errors=True)
    return f"no small copy of this model can be built ({problem})"


def _build(
    source: ModelSource,
    schemes: Mapping[str, Scheme | None],
    kinds: list[object],
    config: Mapping[str, Any],
    folder: Path,
    shrunk: bool,
    trust_remote_code: bool,
) -> Skeleton:
    """Build, store and open the small model.

    Raises:
        ValueError: it is no skeleton of the large one; modelling code raises other errors.
    """
    large: Any = source.skeleton
    made: Any = type(large.config).from_dict(dict(config))
    made.dtype = source.dtype
    with init_empty_weights():
        size = sum(parameter.numel() for parameter in type(large)(copy.deepcopy(made)).parameters())
    if size > _LARGEST_SKELETON:
        raise ValueError(f"it would have {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(large)(made)
        _draw_parameters(model)
    model = model.to(source.dtype).eval()
    model.save_pretrained(folder)
    if source.folder is not None:
        for code in source.folder.glob("*.py"):
            shutil.copy(code, folder)
        small = open_model(str(folder), trust_remote_code=trust_remote_code)
    else:
        small = ModuleSource(model, type(large).__name__)
    small.load(small.tensor_names())
    blocks = find_blocks(small.skeleton)
    names = [f"{block}.{name}" for block in blocks for name in find_linears(small.skeleton.get_submodule(block))]
    wanted = {name: schemes[name] for name in names}
    if [_kind(small.skeleton, wanted, block) for block in blocks] != kinds:
        raise ValueError("its blocks would be others")
    if not source.config_changes and _patterns(small.tensor_names()) != _patterns(source.tensor_names()):
        raise ValueError("its tensors would be others")
    tokens = [[(7 * position + 3) % made.get_text_config().vocab_size for position in range(_TOKENS)]]
    called = _called_linears(small.skeleton, tokens)
    kept = {
        name: scheme if (called is None or name in called) and _fits(scheme, small.skeleton, name) else None
        for name, scheme in wanted.items()
    }
    return Skeleton(folder, small, _fit_groups(kept, small.skeleton), shrunk, tokens, called is not None)


def _kind(model: nn.Module, schemes: Mapping[str, Scheme | None], block: str) -> object:
    """What two blocks must have in common to be loaded alike: classes and names of everything, and schemes."""
    found = set()
    for name, parameter in model.get_submodule(block).named_parameters():
        owner = f"{block}.{name.rpartition('.')[0]}"
        kind = type(model.get_submodule(owner.rstrip("."))).__name__
        found.add((_NUMBER.sub("#", name), kind, parameter.ndim, schemes.get(owner)))
    return frozenset(found)


def _patterns(names: frozenset[str]) -> set[str]:
    return {_NUMBER.sub("#", name) for name in names}


@torch.no_grad()
def _draw_parameters(model: nn.Module) -> None:
    """Weights that no block can be left out of unnoticed: the usual ones of .02 make blocks almost transparent."""
    for module in model.modules():
        if is_linear(module):
            linear_weight(module).normal_(std=linear_weight(module).shape[1] ** -0.5)
            bias = module.bias
            if isinstance(bias, Tensor):
                bias.normal_(std=0.1)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and not isinstance(module, nn.Conv1d):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _called_linears(model: nn.Module, tokens: list[list[int]]) -> set[str] | None:
    """Names of the linears that a pass calls, all experts included; ``None`` if the model cannot be run."""
    probe: Any = copy.deepcopy(model).float()
    called = set(expert_linears(probe))
    for name, module in probe.named_modules():
        if is_linear(module):
            module.register_forward_pre_hook(lambda _module, _inputs, name=name: called.add(name))
    try:
        finite = bool(run_model(probe, tokens).isfinite().all())
    except Exception:  # modelling code that needs a GPU, a kernel, or inputs other than tokens
        return None
    return called if finite else None


def _fits(scheme: Scheme | None, model: nn.Module, name: str) -> bool:
    """Whether blocks of the input's format divide the small linear's width, which those of the large one did."""
    inputs = None if scheme is None else scheme.activation_format
    return inputs is None or inputs.unsupported_reason(linear_weight(model.get_submodule(name)).shape[1]) is None


def _fit_groups(schemes: Mapping[str, Scheme | None], model: nn.Module) -> dict[str, Scheme | None]:
    """Groups and blocks that divide the small model's widths where those of the large one did, if there is a choice."""
    schemes = {
        name: scheme and scheme.fitting(linear_weight(model.get_submodule(name)).shape)
        for name, scheme in schemes.items()
    }
    fitting: dict[Scheme, int] = {}
    for name, scheme in schemes.items():
        if scheme is not None and scheme.group_size is not None and not scheme.number_format.fixed_groups:
            width = linear_weight(model.get_submodule(name)).shape[1]
            fitting[scheme] = math.gcd(fitting.get(scheme, scheme.group_size), width)
    return {
        name: _in_groups(scheme, fitting[scheme]) if scheme is not None and scheme in fitting else scheme
        for name, scheme in schemes.items()
    }


def _in_groups(scheme: Scheme, size: int) -> Scheme:
    """The scheme with other groups; as it is where the format has one size, whose last group may be short."""
    try:
        return dataclasses.replace(scheme, group_size=size)
    except UsageError:
        return scheme


def _draw(linear: nn.Module, scheme: Scheme, seed: int) -> QuantizedWeight:
    """Random codes and parameters of a sensible size."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = linear_weight(linear).shape
    weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
    record = scheme.number_format
    grid = record.grid(record.fit(weight, scheme, "minmax"), scheme, columns)
    quantized = QuantizedWeight.from_grid(grid.round(weight), grid, scheme)
    inputs = scheme.activation_format
    return quantized if inputs is None else dataclasses.replace(quantized, input_params=inputs.fit(torch.ones(columns)))
