"""Tuning after the closed form: rounding offsets and transforms by gradient, nothing else."""

from mxrot.tuning.loop import Check, TuningCheckpoint
from mxrot.tuning.network import tune_network
from mxrot.tuning.reconstruction import tune_block

__all__ = ["Check", "TuningCheckpoint", "tune_block", "tune_network"]
