"""What vLLM does with a checkpoint, for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mxrot.vllm.verdict import DEVICES, VERSION, Serving, VllmReport


def print_vllm_report(report: VllmReport, out: Console) -> None:
    """Whether it runs, with stock vLLM and with mxrot beside it; what each device computes."""
    _print_serving(f"vLLM {VERSION}", report.stock, out)
    if not report.stock.stops:
        table = Table("device", "computes", "", title="What stock vLLM chooses; read in its code", title_justify="left")
        for device in DEVICES:
            table.add_row(device.device, device.computes, device.note)
        out.print(table)
        for note in report.notes:
            out.print(f"  note: {note}", highlight=False, soft_wrap=True)
    _print_serving(f"vLLM {VERSION} with mxrot installed", report.plugin, out)


def _print_serving(title: str, serving: Serving, out: Console) -> None:
    if not serving.stops:
        sizes = ", ".join(map(str, serving.tensor_parallel))
        out.print(f"{title}: runs it; tensor parallel {sizes}", highlight=False, soft_wrap=True)
        return
    out.print(f"{title}: does not run it", highlight=False, soft_wrap=True)
    for stop in serving.stops:
        out.print(f"  {stop}", highlight=False, soft_wrap=True)
