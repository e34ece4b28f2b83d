"""Changes to a model's modules: folding into neighbours, and the replacement of linears."""

from mxrot.surgery.fold_norms import FoldedNorms
from mxrot.surgery.permute import PermutedFfn, permutable_linears
from mxrot.surgery.permute_heads import PermutedHeads
from mxrot.surgery.replace import install_empty_site, stored_tensors
from mxrot.surgery.rotate import Rotated, Rotations
from mxrot.surgery.rotate_heads import RotatedHeads
from mxrot.surgery.smooth import Weights, fold_into_producer, shareable_scales
from mxrot.surgery.untie import Untied

__all__ = [
    "FoldedNorms",
    "PermutedFfn",
    "PermutedHeads",
    "Rotated",
    "RotatedHeads",
    "Rotations",
    "Untied",
    "Weights",
    "fold_into_producer",
    "install_empty_site",
    "permutable_linears",
    "shareable_scales",
    "stored_tensors",
]
