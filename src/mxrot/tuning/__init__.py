"""Training by gradient: rotations before quantizing; rounding, transforms and levels after the closed form."""

from mxrot.tuning.levels import gains_of
from mxrot.tuning.loop import Check, TuningCheckpoint
from mxrot.tuning.network import tune_network
from mxrot.tuning.reconstruction import tune_block
from mxrot.tuning.rotated_network import RotatedNetwork
from mxrot.tuning.rotations import RotationTraining, train_rotations
from mxrot.tuning.trained_sites import trained_sites

__all__ = [
    "Check",
    "RotatedNetwork",
    "RotationTraining",
    "TuningCheckpoint",
    "gains_of",
    "train_rotations",
    "trained_sites",
    "tune_block",
    "tune_network",
]
