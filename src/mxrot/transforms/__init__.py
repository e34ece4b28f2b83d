"""Input transforms, the stages they consist of, and the methods that build them.

Each method and each kind of stage is one class in a file of this package. They are found by scanning these files.
"""

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module

from mxrot.errors import ConfigError
from mxrot.nearest import not_known
from mxrot.transforms.base import FitSize, SiteSample, TransformMethod, generator_for
from mxrot.transforms.channel_order import ChannelOrder, at_once, channel_order, channel_orders
from mxrot.transforms.hadamard_of_width import HadamardOfWidth, HadamardOfWidthSpec
from mxrot.transforms.site_transform import SiteTransform, empty_tensors, stored_tensors
from mxrot.transforms.smoothing import SmoothingBy
from mxrot.transforms.stages import (
    BlockDiagonal,
    BlockDiagonalSpec,
    Permutation,
    PermutationSpec,
    Sharing,
    Stage,
    StageSpec,
    spec_from_table,
)


def _methods() -> Iterator[type[TransformMethod]]:
    """The classes in this package's files that are complete methods."""
    for file in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{file.name}")
        for found in vars(module).values():
            is_own = isinstance(found, type) and found.__module__ == module.__name__
            if is_own and issubclass(found, TransformMethod) and not inspect.isabstract(found):
                yield found


METHODS: dict[str, type[TransformMethod]] = {
    method.name: method for method in sorted(_methods(), key=lambda method: method.name)
}


def get_transform(name: str) -> type[TransformMethod]:
    """The method called `name`. ConfigError, with a list of all methods, if there is none."""
    if name not in METHODS:
        raise ConfigError(not_known("transform", name, METHODS))
    return METHODS[name]


__all__ = [
    "METHODS",
    "BlockDiagonal",
    "BlockDiagonalSpec",
    "ChannelOrder",
    "FitSize",
    "HadamardOfWidth",
    "HadamardOfWidthSpec",
    "Permutation",
    "PermutationSpec",
    "Sharing",
    "SiteSample",
    "SiteTransform",
    "SmoothingBy",
    "Stage",
    "StageSpec",
    "TransformMethod",
    "at_once",
    "channel_order",
    "channel_orders",
    "empty_tensors",
    "generator_for",
    "get_transform",
    "spec_from_table",
    "stored_tensors",
]
