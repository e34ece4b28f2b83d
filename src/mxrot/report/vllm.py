"""vLLM's support of a checkpoint, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from mxrot.vllm.devices import DEVICES, VERSION
from mxrot.vllm.verdict import Serving, VllmReport


def print_vllm_report(report: VllmReport, out: Console) -> None:
    """Print whether it runs, with stock vLLM and with the mxrot plugin, and what each device computes."""
    stock, plugin = (list(_serving_lines(title, serving)) for title, serving in _ways(report))
    _print(stock, out)
    if not report.stock.stops:
        table = Table("device", "computes", "", title="What stock vLLM chooses; read in its code", title_justify="left")
        for device in DEVICES:
            table.add_row(device.device, device.computes, device.note)
        out.print(table)
        _print([f"  note: {note}" for note in report.notes], out)
    _print(plugin, out)


def vllm_lines(report: VllmReport) -> Iterator[str]:
    """The same lines without devices and notes."""
    for title, serving in _ways(report):
        yield from _serving_lines(title, serving)


def _ways(report: VllmReport) -> list[tuple[str, Serving]]:
    return [(f"vLLM {VERSION}", report.stock), (f"vLLM {VERSION} with mxrot installed", report.plugin)]


def _serving_lines(title: str, serving: Serving) -> Iterator[str]:
    if not serving.stops:
        what = "what `mxrot export --to vllm -o` writes of it" if serving.needs_export else "it"
        yield f"{title}: runs {what}; tensor parallel {', '.join(map(str, serving.tensor_parallel))}"
        return
    yield f"{title}: does not run it"
    yield from (f"  {stop}" for stop in serving.stops)


def _print(lines: list[str], out: Console) -> None:
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True)
