"""Input transforms, the stages they are made of, and the methods that build them. A method is one class, listed
here."""

from mxrot.errors import ConfigError
from mxrot.nearest import not_known
from mxrot.transforms.base import FitSize, SiteSample, TransformMethod, generator_for
from mxrot.transforms.hadamard import Hadamard, Identity, RandomHadamard, RandomOrthogonal
from mxrot.transforms.moments import SecondMoment
from mxrot.transforms.outlier import OutlierRotation
from mxrot.transforms.site_transform import SiteTransform, empty_tensors, stored_tensors
from mxrot.transforms.stages import (
    BlockDiagonal,
    BlockDiagonalSpec,
    HadamardOfWidth,
    HadamardOfWidthSpec,
    Permutation,
    PermutationSpec,
    Sharing,
    Stage,
    StageSpec,
    spec_from_table,
)

METHODS: dict[str, type[TransformMethod]] = {
    method.name: method
    for method in (Identity, Hadamard, RandomHadamard, RandomOrthogonal, OutlierRotation, SecondMoment)
}


def get_transform(name: str) -> type[TransformMethod]:
    """The method called `name`; ConfigError with the list of known ones."""
    if name not in METHODS:
        raise ConfigError(not_known("transform", name, METHODS))
    return METHODS[name]


__all__ = [
    "METHODS",
    "BlockDiagonal",
    "BlockDiagonalSpec",
    "FitSize",
    "HadamardOfWidth",
    "HadamardOfWidthSpec",
    "Permutation",
    "PermutationSpec",
    "Sharing",
    "SiteSample",
    "SiteTransform",
    "Stage",
    "StageSpec",
    "TransformMethod",
    "empty_tensors",
    "generator_for",
    "get_transform",
    "spec_from_table",
    "stored_tensors",
]
