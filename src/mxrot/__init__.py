"""mxrot: LLMs in MXFP4, with the block rotations that make it accurate.

`quantize`, `load` and `evaluate` do the same as the commands of these names. A `Recipe` says how to quantize, a
`QTensor` holds a quantized tensor, and `progress.bar` shows progress. `import mxrot` is quick, because each name is
imported when it is first used. After `import mxrot`, transformers' `from_pretrained` loads checkpoints of mxrot, too.
"""

from __future__ import annotations

from importlib import import_module

from mxrot import autoload
from mxrot.version import __version__ as __version__

TYPE_CHECKING = False  # importing typing alone takes as long as all other imports here
if TYPE_CHECKING:
    from typing import Any

    from mxrot import progress
    from mxrot.api import diverge, evaluate, evaluate_tasks, load, quantize
    from mxrot.checkpoint.huggingface import MxrotConfig
    from mxrot.formats import QTensor
    from mxrot.recipe import Recipe

__all__ = [
    "MxrotConfig",
    "QTensor",
    "Recipe",
    "diverge",
    "evaluate",
    "evaluate_tasks",
    "load",
    "progress",
    "quantize",
]

_HOME = {
    "MxrotConfig": "mxrot.checkpoint.huggingface",
    "QTensor": "mxrot.formats",
    "Recipe": "mxrot.recipe",
    "diverge": "mxrot.api",
    "evaluate": "mxrot.api",
    "evaluate_tasks": "mxrot.api",
    "load": "mxrot.api",
    "quantize": "mxrot.api",
}


autoload.install()


def __getattr__(name: str) -> Any:
    if name == "progress":
        return import_module("mxrot.progress")
    if name not in _HOME:
        raise AttributeError(f"module 'mxrot' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "progress"})
