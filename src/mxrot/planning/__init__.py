"""The requirements of quantizing a model, from its config alone."""

from mxrot.planning.disk import estimate_disk, needed_on_disk
from mxrot.planning.memory import MemoryEstimate, estimate_host_memory, estimate_memory, gigabytes
from mxrot.planning.plan import HOW, Machine, Plan, make_plan
from mxrot.planning.rates import OtherRates, Rates, measure_rates
from mxrot.planning.run import Run
from mxrot.planning.seconds import TimeEstimate, estimate_seconds
from mxrot.planning.shape import ModelShape, SiteShape
from mxrot.planning.stage import Stage

__all__ = [
    "HOW",
    "Machine",
    "MemoryEstimate",
    "ModelShape",
    "OtherRates",
    "Plan",
    "Rates",
    "Run",
    "SiteShape",
    "Stage",
    "TimeEstimate",
    "estimate_disk",
    "estimate_host_memory",
    "estimate_memory",
    "estimate_seconds",
    "gigabytes",
    "make_plan",
    "measure_rates",
    "needed_on_disk",
]
