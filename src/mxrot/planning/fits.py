"""The last line of a plan: whether the model fits, on which device, and how long it takes."""

from __future__ import annotations

from mxrot.environment import available_memory
from mxrot.planning.memory import gigabytes
from mxrot.planning.plan import Machine, Plan
from mxrot.progress.pace import duration


def verdict(plan: Plan, machine: Machine) -> str:
    """The verdict in one line. Memory is compared with the free memory of the planned GPU, on a CPU with main
    memory."""
    if plan.problems:
        more = len(plan.problems) - 1
        return f"verdict: refused: {plan.problems[0]}" + (f" (and {more} more)" if more else "")
    assert plan.needs is not None
    if machine.computes_on_gpu:
        peak, free, where = plan.needs.gpu.peak, machine.free_on_gpu(), "of GPU memory"
    else:
        peak, free, where = plan.needs.cpu.peak, available_memory(), "of main memory"
    each = f", for each of {plan.processes} processes" if plan.processes > 1 else ""
    taken = f"{gigabytes(peak.total)} {where}{each}"
    if free is None:
        return f"verdict: takes {taken}; how much is free is not known{_time(plan)}"
    if peak.total > free:
        return f"verdict: does not fit: {taken} at {peak.name!r}, and {gigabytes(free)} are free"
    return f"verdict: fits: {taken}, and {gigabytes(free)} are free{_time(plan)}"


def _time(plan: Plan) -> str:
    if plan.time is None:
        return ""
    return f"; about {duration(plan.time.total)} on {plan.device}"
