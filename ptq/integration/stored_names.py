"""Tensors that a checkpoint names otherwise than `QuantLinear` or transformers do: renamed when loaded, and back when
saved."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

__all__ = ["StoredNames"]


class StoredNames(WeightRenaming):
    """A step of loading that knows every name it changes, so that dense weights of the same leaf keep theirs."""

    __slots__ = ("names",)

    names: Mapping[str, str]

    @classmethod
    def of(cls, linears: Mapping[str, Mapping[str, str]], prefix: str) -> StoredNames:
        """From the names that `ptq.containers.float_schemes.stored_names` gives.

        Args:
            linears: for each linear by full name, the checkpoint's leaf name by ours.
            prefix: of the base model, which checkpoints of a base model leave out.
        """
        names = {}
        for linear, leaves in linears.items():
            for name in (linear, linear.removeprefix(f"{prefix}."), f"{prefix}.{linear}"):
                names.update({f"{name}.{theirs}": f"{name}.{ours}" for ours, theirs in leaves.items()})
        return cls._with(names)

    @classmethod
    def of_modules(cls, tensors: Iterable[str], conversions: Iterable[Any]) -> StoredNames | None:
        """The step that stands before those of the model, for tensors that checkpoints store under the module's name
        where the model's own names are others (Mixtral's ``mlp`` is ``block_sparse_moe`` in its files).

        Without it a model that is saved would have other names than the checkpoint it was loaded from. Prefixes are
        left to transformers: a base model has none.

        Args:
            tensors: by full name in the model.
            conversions: the model's steps of loading.
        """
        renamings = [
            one for one in conversions if isinstance(one, WeightRenaming) and not isinstance(one, PrefixChange)
        ]
        names = {}
        for name in tensors:
            back: list[Any] = [one.reverse_transform() for one in reversed(renamings)]
            stock = apply_renamings(name, back)
            if stock != name and apply_renamings(stock, [copy.copy(one) for one in renamings]) == name:
                names[name] = stock
        return cls._with(names) if names else None

    @classmethod
    def _with(cls, names: Mapping[str, str]) -> StoredNames:
        new = cls(["weight"], ["weight"])  # patterns that are never asked
        new.names = names
        return new

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """See the class of transformers: the name it gets, and under which pattern."""
        if source_key not in self.names:
            return source_key, None
        self._was_used = True
        return self.names[source_key], source_key

    def reverse_transform(self) -> StoredNames:
        """The step of saving."""
        return self._with({loaded: stored for stored, loaded in self.names.items()})
