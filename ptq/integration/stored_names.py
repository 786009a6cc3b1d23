"""Tensors that a checkpoint names otherwise than `QuantLinear` does: renamed when loaded, and back when saved."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.core_model_loading import WeightRenaming

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
