"""Tables for the terminal."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from mxrot.evaluation import Divergence, KernelChoice, Perplexity, SiteMaxima, TaskScore
from mxrot.quantizing.record import alike
from mxrot.report.rows import ComparedRow

_MOST_NAMED = 8
"""Kinds of linears in a line."""


def comparison_table(rows: Sequence[ComparedRow], title: str) -> Table:
    """Perplexity, size and time of each row."""
    texts = list(rows[0].perplexity) if rows else []
    table = Table(title=title, title_justify="left")
    table.add_column("recipe")
    for text in texts:
        table.add_column(f"perplexity, {text}", justify="right")
    for heading in ("bits a weight", "transforms", "MB", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        if not row.runs:
            table.add_row(row.recipe, *("-" for _ in texts))
            continue
        bits, transforms = row.size.bits_per_weight, row.size.transform_bits_per_weight
        table.add_row(
            row.recipe,
            *(f"{row.perplexity[text].ppl:.2f}" for text in texts),
            f"{row.runs[0].stored_bits}" if bits is None else f"{bits:.2f}",
            f"+{transforms:.3f}" if transforms else "",
            f"{row.size.total_bytes / 1e6:.1f}",
            "" if row.quantize_seconds is None else f"{row.quantize_seconds:.1f}",
        )
    return table


def compared_tasks_table(rows: Sequence[ComparedRow]) -> Table:
    """Of each row acc_norm in each task that has it, else acc, and the mean over tasks."""
    table = Table(title="Tasks, percent +- one standard error over examples", title_justify="left")
    table.add_column("recipe")
    for name, score in rows[0].tasks.items():
        table.add_column(f"{name}\n{score.best}", justify="right", no_wrap=True)
    table.add_column("mean", justify="right")
    for row in rows:
        if not row.runs:
            table.add_row(row.recipe, *("-" for _ in rows[0].tasks))
            continue
        cells = [share(score, score.best, unit="") for score in row.tasks.values()]
        table.add_row(row.recipe, *cells, f"{100 * row.recovery(True).mean:.2f}")
    return table


def recovery_table(rows: Sequence[ComparedRow]) -> Table:
    """Of each row the means over tasks, and what is left of the original's."""
    title = "Means over tasks, and of the original's, percent +- one standard error over examples"
    table = Table(title=title, title_justify="left")
    for heading in ("recipe", "acc_norm or acc", "recovered", "acc alone", "recovered"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in (row for row in rows if row.runs):
        cells = []
        for found in (row.recovery(True), row.recovery(False)):
            error = "" if math.isnan(found.error) else f" +- {100 * found.error:.2f}"
            cells.append(f"{100 * found.mean:.2f}{error}")
            cells.append("" if row.original is None else _percent(found.relative, found.relative_error))
        table.add_row(row.recipe, *cells)
    return table


def _percent(value: float, error: float) -> str:
    """With its standard error where there is one; empty where there is no value."""
    if math.isnan(value):
        return ""
    return f"{100 * value:.1f}" + ("" if math.isnan(error) else f" +- {100 * error:.1f}")


def perplexity_table(model: str, results: dict[str, Perplexity]) -> Table:
    """One line a text."""
    table = Table(title=f"Perplexity of {model}", title_justify="left")
    for heading in ("text", "perplexity", "nats a token", "windows", "tokens scored"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for name, result in results.items():
        counts = (f"{result.windows} x {result.seq_len}", f"{result.tokens:,}")
        table.add_row(name, f"{result.ppl:.3f}", f"{result.nll:.4f}", *counts)
    return table


def tasks_table(model: str, scores: dict[str, TaskScore]) -> Table:
    """One line a task, each share with its standard error over examples."""
    table = Table(title=f"Tasks, {model}; +- one standard error over examples", title_justify="left")
    for heading in ("task", "acc", "acc_norm", "examples", "split"):
        table.add_column(heading, justify="left" if heading in ("task", "split") else "right")
    for name, score in scores.items():
        table.add_row(name, share(score, "acc"), share(score, "acc_norm"), str(score.n), score.split)
    return table


def share(score: TaskScore, metric: str, unit: str = " %") -> str:
    """In percent, with its standard error where there is one; empty for a metric that the task does not have."""
    mean, error = score.mean(metric), score.error(metric)
    if mean is None:
        return ""
    return f"{100 * mean:.2f}{unit}" + ("" if error is None else f" +- {100 * error:.2f}")


def divergence_table(model: str, original: str, results: dict[str, Divergence]) -> Table:
    """One line for each text. Figures have their standard errors over windows."""
    table = Table(title=f"{model} against {original}; +- one standard error over windows", title_justify="left")
    table.box, table.show_edge, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, False, (0, 0, 0, 1)
    for heading in ("text", "KL,\nnats a token", "same top\ntoken, %", "perplexity", "of the\noriginal", "difference"):
        table.add_column(heading, justify="left" if heading == "text" else "right", no_wrap=heading != "text")
    for name, found in results.items():
        table.add_row(
            name,
            f"{found.kl:.4f} +- {found.kl_error:.4f}",
            f"{100 * found.agreement:.2f} +- {100 * found.agreement_error:.2f}",
            f"{found.ppl:.3f}",
            f"{found.original_ppl:.3f}",
            f"{found.ppl_difference:+.3f} +- {found.ppl_error:.3f}",
        )
    return table


def maxima_table(sites: Sequence[SiteMaxima]) -> Table:
    """One line a site."""
    table = Table(title="Inputs: max |x| of a channel over the tokens", title_justify="left")
    for heading in ("site (its first linear)", "channels", "largest", "at channel", "median", "ratio"):
        table.add_column(heading, justify="left" if heading.startswith("site") else "right")
    for site in sites:
        numbers = (f"{site.channels}", f"{site.largest:.4g}", f"{site.channel}", f"{site.median:.4g}")
        table.add_row(site.site, *numbers, f"{site.ratio:.1f}")
    return table


def choices_table(choices: Sequence[KernelChoice]) -> Table:
    """One line a shape and number of rows."""
    table = Table(title="What computes the linears", title_justify="left")
    for heading in ("N x K", "linears", "rows", "kernel", "because"):
        table.add_column(heading, justify="left" if heading in ("kernel", "because") else "right")
    for choice in choices:
        shape = " x ".join(map(str, choice.shape))
        table.add_row(shape, str(choice.linears), str(choice.rows), choice.path or "plain", choice.reason)
    return table


def errors_table(blocks: Sequence[dict[str, Any]]) -> Table:
    """One line for each linear, from the `blocks` of a run.json. Of the experts of a block, the one with the largest
    error.

    Errors of outputs and damping are left out if no linear has them.
    """
    table = Table(title="Relative error (Frobenius norm)", title_justify="left")
    linears = [linear for block in blocks for linear in _largest_of_experts(block["linears"])]
    there = [key for key in ("output_error", "damping") if any(linear[key] is not None for linear in linears)]
    for heading in ("linear", "shape", "weights", *(key.removesuffix("_error") for key in there)):
        table.add_column(heading, justify="left" if heading == "linear" else "right")
    for linear in linears:
        rows, columns = linear["shape"]
        values = {"output_error": f"{linear['output_error'] or 0:.4f}", "damping": f"{linear['damping'] or 0:g}"}
        more = ("" if linear[key] is None else values[key] for key in there)
        table.add_row(linear["name"], f"{rows} x {columns}", f"{linear['weight_error']:.4f}", *more)
    return table


def _largest_of_experts(linears: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One linear of each name, not counting the number of an expert."""
    found: dict[str, dict[str, Any]] = {}
    for linear in linears:
        name = re.sub(r"\.experts\.\d+\.", ".experts.*.", linear["name"])
        if name not in found or _error(linear) > _error(found[name]):
            found[name] = linear
    return list(found.values())


def _error(linear: dict[str, Any]) -> float:
    return float(linear["weight_error"] if linear["output_error"] is None else linear["output_error"])


def experts_line(run: dict[str, Any], shown: int = 3) -> str:
    """One line on experts that too few calibration tokens were sent to, from a run.json; empty where there are none."""
    few = {name: count for block in run["blocks"] for name, count in block.get("few_tokens", {}).items()}
    if not few:
        return ""
    named = ", ".join(f"{name} ({count})" for name, count in list(few.items())[:shown])
    more = f" and {len(few) - shown} more, named in run.json" if len(few) > shown else ""
    return f"calibrated on all tokens of the block, because too few were sent to them: {named}{more}"


def left_line(run: dict[str, Any]) -> str:
    """One line on the linears that were left as they were, from a run.json; empty where there are none."""
    left = run.get("left_alone") or {"linears": []}
    if not left["linears"]:
        return ""
    named = [f"{name} ({count})" if count > 1 else name for name, count in alike(left["linears"]).items()]
    more = f" and {len(named) - _MOST_NAMED} more kinds, named in run.json" if len(named) > _MOST_NAMED else ""
    return (
        f"left as they were: {', '.join(named[:_MOST_NAMED])}{more}; {left['bytes'] / 1e6:.1f} MB, "
        f"{100 * left['share_of_bytes']:.1f} % of all bytes"
    )


def recipe_line(run: dict[str, Any]) -> str:
    """One line on what the model had no room for of the recipe, from a run.json; empty where it had for all."""
    return "; ".join(f"left out of the recipe: {said}" for said in run.get("left_out_of_recipe", []))


def passed_line(run: dict[str, Any]) -> str:
    """One line on tensors of the original that no model loads, from a run.json; empty where there are none."""
    return str(run.get("passed_over") or "")


def rank_line(run: dict[str, Any]) -> str:
    """One line on the linears whose Hessian has seen fewer tokens than they have inputs; empty where there are none."""
    linears = [linear for block in run["blocks"] for linear in block["linears"] if linear.get("tokens") is not None]
    short = {linear["name"]: linear for linear in linears if linear["tokens"] < linear["shape"][1]}
    if not short:
        return ""
    named = [f"{name} ({count})" if count > 1 else name for name, count in alike(short).items()]
    shown = ", ".join(named[:_MOST_NAMED]) + (f" and {len(named) - _MOST_NAMED} more" if named[_MOST_NAMED:] else "")
    worst = min(short.values(), key=lambda linear: linear["tokens"] / linear["shape"][1])
    return (
        "fewer calibration tokens than inputs, so that the Hessian is not of full rank: "
        f"{len(short)} of {len(linears)} linears ({shown}; {worst['tokens']} tokens for {worst['shape'][1]} inputs); "
        "take more --samples or --seq-len"
    )


def size_line(size: dict[str, Any]) -> str:
    """One line on the bytes of a checkpoint, from the `size` of a run.json."""
    weights = (size["code_bytes"] + size["scale_bytes"]) / 1e6
    of = ", those left as they were too" if size.get("left_weights") else ""
    head = f", in which the quantized head takes {size['head_bytes'] / 1e6:.1f} MB" if size.get("head_bytes") else ""
    return (
        f"codes and scales {weights:.1f} MB ({size['bits_per_weight']:.3f} bits a weight{of}), "
        f"transforms {size['transform_bytes'] / 1e6:.2f} MB, everything else {size['other_bytes'] / 1e6:.1f} MB{head}"
    )


def head_line(run: dict[str, Any]) -> str:
    """One line on a quantized head, from a run.json; empty where it was left as it is."""
    head = run.get("head")
    if head is None:
        return ""
    shape = " x ".join(map(str, head["shape"]))
    return f"the head {head['name']}, {shape}, is quantized: relative error of its weights {head['weight_error']:.4f}"


def changes_line(run: dict[str, Any]) -> str:
    """One line on what was done to the weights before they were quantized, from a run.json; empty for nothing."""
    changes = run.get("changes")
    return f"done to the weights first: {', '.join(changes)}" if changes else ""


def family_line(run: dict[str, Any]) -> str:
    """One line on a family that was derived from the model, from a run.json; empty where a record said it."""
    family = run.get("family")
    if family is None:
        return ""
    sites = "; ".join(f"{site['name']}: {', '.join(site['linears'])}" for site in family["sites"])
    return f"sites derived by --family auto, and written into config.json: {sites}"


def rotation_line(run: dict[str, Any]) -> str:
    """One line on the training of rotations, from a run.json; empty where none were trained."""
    losses = run.get("rotation_losses")
    if not losses:
        return ""
    few = max(1, len(losses) // 10)
    first, last = (sum(part) / few for part in (losses[:few], losses[-few:]))
    return (
        f"rotations: trained in {len(losses)} steps, cross entropy in nats a token {first:.4f} at first and {last:.4f} "
        f"at last (means of {few})"
    )


def choice_line(run: dict[str, Any]) -> str:
    """One line on what was chosen by held-out text, from a run.json; empty where there was nothing to choose."""
    trials = run.get("choice")
    if not trials:
        return ""
    kept = [trial for trial in trials if trial["is_kept"]]
    named = "; ".join(trial["candidate"] for trial in kept if trial["candidate"]) or "the recipe as it is"
    return (
        f"chosen among {len(trials)} by divergence on held-out text, nats a token: {named} "
        f"({trials[0]['score']:.4g} as it is, {kept[-1]['score']:.4g} as chosen)"
    )


def sites_choice_line(run: dict[str, Any]) -> str:
    """One line on how strongly sites follow their target, from a run.json; empty where they have not chosen that."""
    linears = [linear for block in run["blocks"] for linear in block["linears"]]
    strengths = Counter(one["target_strength"] for one in linears if one.get("target_strength") is not None)
    if not strengths:
        return ""
    found = [f"{'own' if not one else f'{1 / one:.3g}'} for {count}" for one, count in sorted(strengths.items())]
    return f"target damping that sites chose on held-out windows, by linears: {', '.join(found)}"


def tuning_line(run: dict[str, Any]) -> str:
    """One line on the losses of tuning, from a run.json; empty where nothing was tuned."""
    of_blocks = [block["tuning"] for block in run["blocks"] if block.get("tuning")]
    looks = [run["tuning"]] if run.get("tuning") else of_blocks
    if not looks:
        return ""
    start, end = (sum(choose(look) for look in looks) / len(looks) for choose in (_first_loss, _least_loss))
    steps = sum(look[-1]["step"] for look in looks)
    kind = "divergence of the logits, nats a token" if run.get("tuning") else "relative squared error, mean over blocks"
    return f"tuned in {steps} steps: held-out loss {start:.4g} to {end:.4g} ({kind})"


def _first_loss(look: list[dict[str, Any]]) -> float:
    return float(look[0]["held_out"])


def _least_loss(look: list[dict[str, Any]]) -> float:
    return min(float(check["held_out"]) for check in look)
