"""Loads a model folder as a user of transformers would, and says what came of it.

This file is also run as a script, in a process that must never import ptq (`ptq.proof.prover`): it imports nothing of
this package. As a script it reads one request per line from its standard input, a JSON object with the arguments of
`try_to_load`, and answers each with one line of JSON that begins with `ANSWER`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

__all__ = ["ANSWER", "run_model", "try_to_load"]

ANSWER = "loader answers: "
_NEAR = 0.02
"""Largest distance of logits, relative to the expected ones' norm: float32 passes differ by 1e-5, a lost bias by .1"""
_MAX_SHOWN = 3
_UNEXPECTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def try_to_load(
    folder: str,
    loader: str,
    tokens: list[list[int]] | None,
    expected: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Call ``from_pretrained`` on a folder and run the model.

    Args:
        folder: the model folder.
        loader: name of a class of transformers that has ``from_pretrained``.
        tokens: a batch to run the model on; ``None`` only loads it.
        expected: a safetensors file with ``logits``, float32, of a float32 pass; without it the pass need only end in
            finite numbers.
        trust_remote_code: run modelling code that ships with the model.

    Returns:
        ``problem``: ``None`` or what went wrong, in one line; ``forward``: ``"compared"``, ``"ran"`` or ``"not run"``.
    """
    try:
        import transformers

        model, info = getattr(transformers, loader).from_pretrained(
            folder,
            dtype="auto",
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
        problem = _lacking(model, info)
        if problem is not None:
            return {"problem": problem, "forward": "not run"}
        return _try_forward(model.eval(), tokens, expected)
    except Exception as error:  # whatever loaders and modelling code raise: that is what is being found out
        return {"problem": _in_one_line(error), "forward": "not run"}


def _lacking(model: Any, info: dict[str, Any]) -> str | None:
    """What of the checkpoint was not found, or not used, in one line."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for kind in _UNEXPECTED:
        found = info.get(kind) or ()
        names = [found] if isinstance(found, str) else [x if isinstance(x, str) else str(x[0]) for x in found]
        names = sorted(set(names) - tied)
        if names:
            shown = ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")
            return f"{len(names)} {kind.replace('_', ' ')}: {shown}"
    meta = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    return f"{len(meta)} parameters without a value: {', '.join(meta[:_MAX_SHOWN])}" if meta else None


def _try_forward(model: Any, tokens: list[list[int]] | None, expected: str | None) -> dict[str, Any]:
    if tokens is None:
        return {"problem": None, "forward": "not run"}
    from safetensors.torch import load_file

    logits = run_model(model, tokens)  # in the model's dtype, and for the stock quantizer to unpack
    if not bool(logits.isfinite().all()):
        return {"problem": "its logits are not finite", "forward": "ran"}
    if expected is None:
        return {"problem": None, "forward": "ran"}
    wanted = load_file(expected)["logits"]
    from torch.nn import Module

    Module.float(model)  # not `model.float()`, which transformers refuses for quantized models
    found = run_model(model, tokens)
    distance = float((found - wanted).norm() / wanted.norm())
    problem = None if distance <= _NEAR else f"its logits are off by {100 * distance:.2g} %"
    return {"problem": problem, "forward": "compared"}


def run_model(model: Any, tokens: list[list[int]]) -> Any:
    """Logits in float32, ``[batch, tokens, vocabulary]``."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits.float()


def _in_one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")


def _answer_requests() -> None:
    """Answer requests until the standard input ends; what libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answer = try_to_load(**json.loads(line))
        assert not any(name.partition(".")[0] == "ptq" for name in sys.modules), "ptq was imported"
        answers.write(f"{ANSWER}{json.dumps(answer)}\n")
        answers.flush()


if __name__ == "__main__":
    _answer_requests()
