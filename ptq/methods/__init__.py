"""The table of methods. Adding one: a file in `layerwise` or `learned`, a line in ``_BUILT_IN``, a line in the test
matrix, a docs page.

Packages outside join through the entry-point group ``ptq.methods``; each entry point names a `LayerMethod` or a
`WindowMethod`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from types import MappingProxyType

from ptq.errors import UsageError, unknown_name
from ptq.methods.base import LayerMethod, LayerResult, WindowMethod, check_scheme, make_config, parse_options
from ptq.methods.layerwise.coreq import COREQ
from ptq.methods.layerwise.gptaq import GPTAQ
from ptq.methods.layerwise.gptq import GPTQ
from ptq.methods.layerwise.itq3s import ITQ3S
from ptq.methods.layerwise.llm_fp4 import LLM_FP4
from ptq.methods.layerwise.rtn import RTN
from ptq.methods.learned.autoround import AUTOROUND
from ptq.methods.learned.omniquant import OMNIQUANT
from ptq.methods.learned.sliderquant import SLIDERQUANT, SLIDERQUANT_LORA

__all__ = [
    "METHODS",
    "LayerMethod",
    "LayerResult",
    "WindowMethod",
    "check_scheme",
    "find_method",
    "make_config",
    "parse_options",
]

_BUILT_IN = (RTN, GPTQ, GPTAQ, COREQ, ITQ3S, LLM_FP4, SLIDERQUANT, SLIDERQUANT_LORA, OMNIQUANT, AUTOROUND)


def _collect() -> dict[str, LayerMethod | WindowMethod]:
    table: dict[str, LayerMethod | WindowMethod] = {method.name: method for method in _BUILT_IN}
    for point in entry_points(group="ptq.methods"):
        method = point.load()
        if not isinstance(method, LayerMethod | WindowMethod) or method.name in table:
            raise UsageError(
                f"the entry point {point.value} of group ptq.methods is no new LayerMethod or WindowMethod."
            )
        table[method.name] = method
    return table


METHODS = MappingProxyType(_collect())


def find_method(name: str) -> LayerMethod | WindowMethod:
    """The method of that name.

    Raises:
        UsageError: there is none; near names are offered.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]
