"""The format of an output, settled by loading a skeleton of it.

The rules of `ptq.containers.select` say what a container can carry. Whether stock transformers then really loads a
model of this family is not in any rule: it is tried, in a process without ptq. What fails there is written natively,
which is tried in this process, where ptq is imported as it will be in the user's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers

from calib.checkpoint.reader import ModelSource, quiet_transformers
from calib.model.model_class import find_model_class
from calib.model.structure import all_linears
from ptq.containers.select import select_container
from ptq.containers.vllm import vllm_phrase
from ptq.errors import ModelError, UsageError
from ptq.integration.transformers import register
from ptq.proof.loader import try_to_load
from ptq.proof.prover import StockProver
from ptq.proof.skeleton import Skeleton, make_skeleton
from ptq.proof.verdicts import Verdict, recall, remember, structure_key
from ptq.scheme import KeyValueScheme, Scheme

__all__ = ["FormatChoice", "settle_format"]


@dataclasses.dataclass(frozen=True)
class FormatChoice:
    """A format and why it was chosen.

    Args:
        name: ``compressed-tensors`` or ``native``.
        reason: one phrase for the report.
        proofs: by format, what came of loading a skeleton of it; empty where a finished part had settled the format.
    """

    name: str
    reason: str
    proofs: Mapping[str, Verdict] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The proofs as plain data."""
        return {name: verdict.to_dict() for name, verdict in self.proofs.items()}

    def native_instead(self, reason: str) -> FormatChoice:
        """The native format after all, for ``reason``.

        Raises:
            ModelError: the skeleton in that format did not load.
        """
        _require(self.proofs.get("native"), reason)
        return FormatChoice("native", reason, self.proofs)


def settle_format(
    requested: str,
    schemes: Mapping[str, Scheme | None],
    source: ModelSource,
    key_values: KeyValueScheme | None,
    *,
    trust_remote_code: bool = False,
) -> FormatChoice:
    """Choose the format of an output and try whether it loads.

    Args:
        requested: ``auto`` or the name of a container.
        schemes: of all linears in the blocks by full name, ``None`` for full precision.
        source: the model.
        key_values: how keys and values are rounded at run time.
        trust_remote_code: run modelling code that ships with the model.

    Raises:
        UsageError: compressed-tensors was asked for, and cannot carry the result or does not load.
        ModelError: not even the native format loads.
    """
    linears = all_linears(source.skeleton)
    name, reason = select_container(requested, schemes, linears, source.skeleton, key_values)
    proofs: dict[str, Verdict] = {}
    with _Trial(source, schemes, key_values, trust_remote_code) as trial:
        if name == "compressed-tensors":
            proofs[name] = trial.verdict(name)
            problem = _stock_problem(proofs[name])
            if problem is not None and requested != "auto":
                raise UsageError(f"{problem}. Use --container native or auto.")
            one_scheme = len(set(schemes.values())) == 1
            if problem is None and one_scheme:
                return FormatChoice(name, _stock_reason(proofs[name], schemes, linears), proofs)
            proofs["native"] = trial.verdict("native")  # also where fused kernels may still need it (`check_kernels`)
            if problem is None:
                return FormatChoice(name, _stock_reason(proofs[name], schemes, linears), proofs)
            reason = problem
        elif name != "native":
            return FormatChoice(name, f"{reason}; written as its readers have it, and not tried here")
        else:
            proofs["native"] = trial.verdict("native")
    _require(proofs["native"], reason)
    return FormatChoice("native", reason, proofs)


def _require(native: Verdict | None, reason: str) -> None:
    if native is not None and native.loads is False:
        raise ModelError(
            f"what would be written does not load with `import ptq`, tried on a copy of random weights: "
            f"{native.problem} (native format; {reason}). Nothing was quantized. "
            f"Please report it with the model's config.json."
        )


def _stock_problem(verdict: Verdict) -> str | None:
    """Why stock transformers is not said to load it."""
    here = f"stock transformers {version('transformers')}"
    if verdict.loads is None:
        return f"it could not be tried whether {here} loads it: {verdict.problem}"
    return None if verdict.loads else f"{here} does not load it: {verdict.problem}"


def _stock_reason(verdict: Verdict, schemes: Mapping[str, Scheme | None], linears: Mapping[str, Any]) -> str:
    checked = {
        "compared": "checked, with equal logits",
        "ran": "checked, a pass ran",
        "not run": "checked, no pass was run",
    }
    return f"stock transformers {version('transformers')} loads it ({checked[verdict.forward]}); " + vllm_phrase(
        schemes, linears
    )


class _Trial:
    """The skeleton of one output, made when a verdict is not known, and the process that loads it."""

    def __init__(
        self,
        source: ModelSource,
        schemes: Mapping[str, Scheme | None],
        key_values: KeyValueScheme | None,
        trust_remote_code: bool,
    ) -> None:
        self.source, self.schemes, self.key_values = source, schemes, key_values
        self.trust_remote_code = trust_remote_code
        self._open = contextlib.ExitStack()
        self._prover: StockProver | None = None
        self._made: Skeleton | str | None = None

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def verdict(self, form: str) -> Verdict:
        """Whether the output loads in that format, remembered or tried."""
        key = structure_key(self.source, self.schemes, self.key_values, form, self.trust_remote_code)
        found = recall(key)
        if found is None:
            found = self._try(form)
            remember(key, found)
        return found

    def _try(self, form: str) -> Verdict:
        if self._made is None:
            folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="ptq-proof-"))
            self._made = make_skeleton(
                self.source,
                self.schemes,
                Path(folder) / "full",
                trust_remote_code=self.trust_remote_code,
            )
        loader = _loader(self.source, self.trust_remote_code)
        if isinstance(self._made, str):
            return Verdict(None, self._made)
        if loader is None:
            return Verdict(None, f"{type(self.source.skeleton).__name__} is no class of transformers")
        skeleton = self._made
        with quiet_transformers():
            answer = self._load(skeleton, form, loader)
        problem = answer["problem"]
        return Verdict(problem is None, problem, answer["forward"], skeleton.shrunk, skeleton.blocks)

    def _load(self, skeleton: Skeleton, form: str, loader: str) -> dict[str, Any]:
        folder = skeleton.folder.with_name(form)
        try:
            expected = skeleton.write(form, folder, self.key_values)
        except ModelError as error:
            return {"problem": str(error), "forward": "not run"}
        request: dict[str, Any] = {
            "folder": str(folder),
            "loader": loader,
            "tokens": skeleton.tokens if skeleton.runs else None,
            "expected": None if expected is None else str(expected),
            "trust_remote_code": self.trust_remote_code,
        }
        answer = self._tried(form, request)
        if answer["problem"] is None:
            return answer
        # What full precision does as well is no fault of the packed form.
        plain = self._tried(form, request | {"folder": str(skeleton.folder), "expected": None})
        return plain | {"problem": None} if plain["problem"] == answer["problem"] else answer

    def _tried(self, form: str, request: dict[str, Any]) -> dict[str, Any]:
        if form == "compressed-tensors":
            if self._prover is None:
                self._prover = self._open.enter_context(stock_prover())
            return self._prover.try_to_load(**request)
        register()
        return try_to_load(**request)


def stock_prover() -> StockProver:
    """A process to load folders in."""
    return StockProver()


def _loader(source: ModelSource, trust_remote_code: bool) -> str | None:
    """The class of transformers that users would load this model with."""
    model: Any = source.skeleton
    if not type(model).__module__.startswith(("transformers.", "transformers_modules.")):
        return None  # a model in memory, of a class of the caller's
    found = find_model_class(model.config, trust_remote_code=trust_remote_code)
    if found is None:
        found = type(model)
    name = str(found.__name__)
    return name if getattr(transformers, name, None) is found else None
