"""Sampling as in `calib.data.sampling`, with a static key-value cache and a step that a CUDA graph replays.

A step of a small or packed model takes a GPU less time than Python takes to launch its kernels. With a cache of fixed
size nothing in a step depends on Python: the token, the uniform number, the position and the key-value cache are
tensors that the step reads and writes, so that one step is captured in a graph and replayed per token. The first step
runs eagerly (kernels are chosen and weights repacked there), and so do all steps of a model that cannot be captured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from calib.data.sampling import check_token, draw, sample_steps
from calib.model.cache import cache_argument

__all__ = ["decode_steps", "static_steps", "unsupported_reason"]

_ALIGNED = 64  # slots of a cache are filled up to a multiple: attention kernels want aligned masks
_Step = Callable[[], object]


def decode_steps(
    model: Any,
    prompt: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    compiled: bool = False,
    on_fallback: Callable[[str], None] | None = None,
) -> Iterator[Tensor]:
    """Continue ``prompt`` as `sample_steps` does; on a GPU with a static cache and a captured step where that works.

    Args:
        model: a Hugging Face causal language model.
        prompt: int64 ``[batch, tokens]``, at least one token, no padding.
        uniform: float64 ``[batch, steps]`` in [0, 1); one number per token to be drawn.
        temperature: 0 takes the most probable token.
        compiled: on a GPU compile the step (``torch.compile``) before it is captured. That takes about a minute, once
            for a model and a length, and joins the small operators between the products.
        on_fallback: called with the reason, where a GPU goes without compiling, cache or graph.

    Returns:
        What yields int64 ``[batch]`` on the CPU, ``steps`` times.
    """
    if model.device.type != "cuda":
        if compiled and on_fallback is not None:
            on_fallback("steps are compiled on a GPU only")
        return sample_steps(model, prompt, uniform, temperature=temperature)
    return static_steps(
        model,
        prompt,
        uniform,
        temperature=temperature,
        capture=_cuda_graph,
        compile_step=_compiled if compiled else None,
        on_fallback=on_fallback,
    )


@torch.no_grad()
def static_steps(
    model: Any,
    prompt: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    capture: Callable[[_Step, torch.device], _Step],
    compile_step: Callable[[Any], Any] | None = None,
    on_fallback: Callable[[str], None] | None = None,
) -> Iterator[Tensor]:
    """`decode_steps` with the way to capture a step as an argument.

    Args:
        model: as `decode_steps`.
        prompt: as `decode_steps`.
        uniform: as `decode_steps`.
        temperature: as `decode_steps`.
        capture: takes a step that has run once and its device and returns what repeats it, without running it.
        compile_step: from the model to what computes the same for one token; it may raise at its first call.
        on_fallback: as `decode_steps`.

    Yields:
        int64 ``[batch]`` on the CPU, ``steps`` times.
    """
    tell, steps = on_fallback or _silent, uniform.shape[1]
    length = -(-(prompt.shape[1] + steps) // _ALIGNED) * _ALIGNED
    reason = unsupported_reason(model, length)
    if reason is not None:
        tell(reason)
        yield from sample_steps(model, prompt, uniform, temperature=temperature)
        return
    state = _State(model, prompt, uniform, temperature, length)
    state.step()
    yield state.token(0)
    if steps == 1:
        return
    if compile_step is not None:
        _compile(state, compile_step, tell)
    launched = [state.launch(state.step)]  # eagerly once more: for one token other kernels run than for a prompt
    repeat = _captured(state, capture, tell) if steps > 2 else state.step
    for step in range(1, steps):
        if step + 1 < steps:  # the GPU goes on while the CPU reads the token before
            launched.append(state.launch(repeat))
        yield state.token(step, launched.pop(0))


def unsupported_reason(model: Any, length: int) -> str | None:
    """Why a model's steps cannot be captured, as far as that can be said beforehand; ``None`` if nothing is known.

    Args:
        model: a Hugging Face causal language model.
        length: tokens that the cache holds.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    devices = {str(tensor.device) for tensor in model.parameters()}
    if len(devices) > 1:
        return f"it lies on several devices ({', '.join(sorted(devices))})"
    attention = getattr(config.get_text_config(decoder=True), "_attn_implementation", "sdpa")
    if attention not in ("sdpa", "eager"):
        return f"its attention ({attention}) has not been tried with a static cache"
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"{type(model).__name__} does not support static caches"
    try:
        layers = StaticCache(config=config, max_cache_len=length).layers
    except Exception as error:  # a config that transformers finds no static layers for
        return f"it has no static cache ({type(error).__name__}: {error})"
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not StaticLayer})
    return f"its cache has layers that count in Python ({', '.join(others)})" if others else None


class _State:
    """All that a step reads and writes, at fixed addresses."""

    def __init__(self, model: Any, prompt: Tensor, uniform: Tensor, temperature: float, length: int) -> None:
        device = model.device
        self.forward, self.temperature, self.device = model, temperature, device
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.arguments = cache_argument(model, self.cache)
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self.arguments["logits_to_keep"] = 1
        self.uniform = uniform.T.to(device, copy=True, memory_format=torch.contiguous_format)  # [steps, batch]
        self.found = torch.zeros(self.uniform.shape, dtype=torch.int64, device=device)  # -1: logits were not finite
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.prompt: Tensor | None = prompt.to(device)
        self.last = torch.zeros(len(prompt), 1, dtype=torch.int64, device=device)
        self.copied = torch.zeros(self.uniform.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.launched = 0

    def step(self) -> None:
        """One token of every sequence; the first call reads the prompt."""
        ids, self.prompt = (self.last if self.prompt is None else self.prompt), None
        out = self.forward(input_ids=ids, use_cache=True, **self.arguments)
        number = self.uniform.index_select(0, self.count)[0]  # [batch]
        token = draw(out.logits[:, -1].float(), number, self.temperature)  # [batch]
        self.found.index_copy_(0, self.count, token[None])
        self.last.copy_(token.clamp(min=0)[:, None])
        self.count.add_(1)

    def written(self) -> list[Tensor]:
        """What a step changes, but for the keys and values of its token, which the next one writes again."""
        layers: list[Any] = self.cache.layers  # `StaticLayer`, see `unsupported_reason`
        counts = [layer.cumulative_length for layer in layers]
        return [*counts, self.found, self.last, self.count]

    def launch(self, repeat: _Step) -> Any:
        """Run a step and have its tokens copied; what `token` waits for."""
        repeat()
        self.launched += 1
        self.copied[self.launched].copy_(self.found[self.launched], non_blocking=True)
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def token(self, step: int, event: Any = None) -> Tensor:
        """Tokens of a step on the CPU, int64 ``[batch]``.

        Raises:
            NumericalError: NaN or Inf among the logits.
        """
        if step == 0:
            self.copied[0].copy_(self.found[0])
        elif event is not None:
            event.synchronize()
        return check_token(self.copied[step].clone())


def _compile(state: _State, compile_step: Callable[[Any], Any], tell: Callable[[str], None]) -> None:
    """Have the state's steps compiled, from a step whose token is thrown away; without it where that fails."""
    eager = state.forward
    before = [tensor.clone() for tensor in state.written()]
    try:
        state.forward = compile_step(eager)
        state.step()
    except Exception as error:  # whatever a model's code or the machine's compilers do not take
        state.forward = eager
        tell(f"a step of it cannot be compiled ({type(error).__name__}: {_first_line(error)})")
    for tensor, value in zip(state.written(), before, strict=True):
        tensor.copy_(value)


def _compiled(model: Any) -> Any:
    return torch.compile(model.__call__, fullgraph=True, dynamic=False)


def _captured(state: _State, capture: Callable[[_Step, torch.device], _Step], tell: Callable[[str], None]) -> _Step:
    try:
        return capture(state.step, state.device)
    except Exception as error:  # whatever a model's code does that a graph cannot repeat; nothing has run
        tell(f"a step of it cannot be captured in a graph ({type(error).__name__}: {_first_line(error)})")
        return state.step


def _cuda_graph(step: _Step, device: torch.device) -> _Step:
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    return graph.replay


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def _silent(reason: str) -> None:
    pass
