"""What compressed-tensors can say and vLLM reads, while stock transformers does not: chosen only where asked for.

Zero points of packed integers: transformers (5.23) raises in its usual way of loading, because the library makes no
room for packed ones; ``CompressedTensorsConfig(dequantize=True)`` loads them. vLLM takes those of 4 and 8 bits.

Inputs rotated at run time, ``transform_config``: transformers (up to 5.23) drops it without a word and computes with
inputs that are not rotated. So ``config.json`` has the sentence that stops a transformers without us, as in the native
container. What the library can say is one Sylvester-Hadamard matrix for all blocks of an input: ``type: hadamard``
with the block as ``head_dim``. Random signs have no words in it, so a recipe for this container rotates without them.
Only what is done at run time is written: weights are stored rotated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from compressed_tensors.utils.match import match_named_modules
from pydantic import ValidationError
from torch import nn

from calib.model.experts import expert_linears
from ptq.containers.compressed_tensors import CompressedTensorsContainer
from ptq.containers.native import GUARD_KEY
from ptq.errors import OutputError
from ptq.scheme import ROTATION_BLOCKS, KeyValueScheme, Rotation, Scheme
from ptq.transforms.hadamard import hadamard_blocks

__all__ = ["ROTATED_SENTENCE", "VLLM_TENSORS", "VllmTensorsContainer", "stored_rotations", "unsigned"]

ROTATED_SENTENCE = (
    "inputs of linears are rotated at run time (transform_config), which transformers does not do: serve this model "
    "with vLLM, or run `pip install ptq-toolkit` and `import ptq` before from_pretrained"
)
ASYMMETRIC_BITS = (4, 8)
_KEY = "transform_config"
_AGAIN = "quantize again with --container compressed-tensors, which rotates without signs and in equal blocks"


class VllmTensorsContainer(CompressedTensorsContainer):
    """The storages of the compressed-tensors library, zero points and Hadamard transforms of inputs."""

    name = "compressed-tensors-vllm"

    def unsupported_reason(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        model: nn.Module,
        key_values: KeyValueScheme | None,
    ) -> str | None:
        """See `Container.unsupported_reason`."""
        rotated = {name: scheme.input_rotation for name, scheme in schemes.items() if scheme is not None}
        experts = expert_linears(model)
        for name, rotation in rotated.items():
            problem = None if rotation is None else _rotation_problem(name, rotation, linears[name], experts)
            if problem is not None:
                return problem
        for name, scheme in schemes.items():
            if scheme is not None and not scheme.symmetric and scheme.bits not in ASYMMETRIC_BITS:
                return (
                    f"{name} has zero points of {scheme.bits} bits, and readers take packed ones of "
                    f"{' and '.join(map(str, ASYMMETRIC_BITS))}: quantize again with --sym"
                )
        plain = {
            name: None if scheme is None else dataclasses.replace(scheme, symmetric=True)
            for name, scheme in _without_rotations(schemes).items()
        }
        return super().unsupported_reason(plain, linears, model, key_values)

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme | None],
        linears: Mapping[str, nn.Module],
        *,
        key_values: KeyValueScheme | None = None,
        others: Iterable[str] = (),
    ) -> dict[str, Any]:
        """See `Container.quantization_config`; the transforms stand beside the groups."""
        plain = super().quantization_config(_without_rotations(schemes), linears, key_values=key_values, others=others)
        sizes: dict[int, list[str]] = {}
        for name, scheme in schemes.items():
            if scheme is not None and scheme.input_rotation is not None:
                block = _blocks(linears[name], scheme.input_rotation)[0]
                sizes.setdefault(block, []).append(name)
        transforms = {
            f"hadamard_{block}": TransformScheme(
                type="hadamard",
                head_dim=block,
                apply=[TransformArgs(targets=_targets(names, linears), location="input")],
            )
            for block, names in sizes.items()
        }
        if not transforms:
            return plain
        return {**plain, _KEY: TransformConfig(config_groups=transforms).model_dump(mode="json")}

    def config_entries(self) -> dict[str, Any]:
        """The sentence that stops a transformers without us, for configs with a ``transform_config``."""
        return {GUARD_KEY: ROTATED_SENTENCE}


def unsigned(rotation: Rotation, width: int) -> Rotation:
    """The rotation as ``transform_config`` can say it, as far as the width allows: no signs, and equal blocks.

    Args:
        rotation: As the recipe has it.
        width: Of the linear's input.
    """
    divisor = width & -width
    block = min(rotation.block or divisor, divisor)
    return Rotation(0, block if block in ROTATION_BLOCKS else None, "hadamard-unsigned")


def stored_rotations(config: Mapping[str, Any], model: nn.Module) -> dict[str, Rotation]:
    """Rotations of inputs by the full name of their linear, from a ``transform_config``.

    Transforms of weights are merged into what is stored, and leave nothing to do.

    Args:
        config: The ``transform_config``.
        model: With the linears that it names.

    Raises:
        OutputError: A transform that ptq does not compute.
    """
    try:
        groups = TransformConfig.model_validate(dict(config)).config_groups if config.get("config_groups") else {}
    except ValidationError as error:
        line = str(error).strip().splitlines()[-1].strip()
        raise OutputError(f"compressed-tensors does not accept the {_KEY} of config.json: {line}") from error
    found: dict[str, Rotation] = {}
    for key, scheme in groups.items():
        for args in scheme.apply:
            if not args.is_online():
                continue
            if args.location != "input" or scheme.type != "hadamard" or scheme.randomize:
                raise OutputError(
                    f"the {_KEY} of config.json applies {scheme.type} to {args.location} ({key}), and ptq computes "
                    f"only `hadamard` of `input`: serve this model with vLLM."
                )
            for name, module in match_named_modules(model, args.targets, args.ignore):
                width = _width(module)
                block = scheme.head_dim or width
                rotation = Rotation(0, block if block in ROTATION_BLOCKS else None, "hadamard-unsigned")
                if set(hadamard_blocks(width, rotation.block)) != {block} or name in found:
                    raise OutputError(
                        f"the {_KEY} of config.json transforms the input of {name}, {width} channels, in blocks of "
                        f"{block}, or twice, which ptq does not compute: serve this model with vLLM."
                    )
                found[name] = rotation
    return found


def _without_rotations(schemes: Mapping[str, Scheme | None]) -> dict[str, Scheme | None]:
    return {
        name: None if scheme is None else dataclasses.replace(scheme, input_rotation=None)
        for name, scheme in schemes.items()
    }


def _rotation_problem(name: str, rotation: Rotation, linear: nn.Module, experts: Collection[str]) -> str | None:
    """Why vLLM would not rotate an input like this; ``None`` if it would."""
    if rotation.kind != "hadamard-unsigned":
        return f"the input of {name} is rotated with random signs, which transform_config cannot say: {_AGAIN}"
    if name in experts:
        return f"the input of the expert {name} is rotated at run time, which only ptq does"
    sizes = set(_blocks(linear, rotation))
    if len(sizes) > 1:
        shown, width = ", ".join(map(str, sorted(sizes, reverse=True))), _width(linear)
        advice = _AGAIN if width % ROTATION_BLOCKS[0] == 0 else "--rotate residual needs none at run time"
        return (
            f"the {width} inputs of {name} are rotated in blocks of {shown}, and transform_config knows equal ones: "
            f"{advice}"
        )
    if getattr(linear, "bias", None) is not None:
        return f"{name} has a bias, and vLLM adds none where an input is transformed"
    return None


def _blocks(linear: nn.Module, rotation: Rotation) -> tuple[int, ...]:
    return hadamard_blocks(_width(linear), rotation.block)


def _width(linear: nn.Module) -> int:
    return int(getattr(linear, "in_features", 0) or getattr(linear, "nx", 0))


def _targets(names: list[str], linears: Mapping[str, nn.Module]) -> list[str]:
    """Patterns where all linears of a leaf name are meant, which hold under a prefix of the reader's, too."""
    wanted, targets = set(names), []
    for leaf in dict.fromkeys(name.rpartition(".")[2] for name in names):
        alike = {name for name in linears if name.rpartition(".")[2] == leaf}
        targets += [f"re:.*[.]{leaf}$"] if alike <= wanted else sorted(wanted & alike)
    return targets


VLLM_TENSORS = VllmTensorsContainer()
