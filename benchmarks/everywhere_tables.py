"""Tables of benchmarks/everywhere.py, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from everywhere_rows import Row, summaries


def shown(value: float | None, error: float | None, digits: int = 3, sign: str = " ± ") -> str:
    """A figure with its error, where it has one."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f"{sign}{error:.{digits}f}")


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The tables of result files: a line for each row, and then one for each recipe over all models and texts.

    Of rows for the same model, calibration and recipe the last file's counts.
    """
    rows = merged(results)
    texts = list(dict.fromkeys(text for row in rows for text in row.get("texts", {})))
    (base, *others) = dict.fromkeys(result["base"] for result in results)
    if others:
        raise SystemExit(f"ratios to {base} and to {', '.join(others)} do not stand in one table")
    heads = ["model", "calibrated on", "recipe", *(head for text in texts for head in (f"{text}: KL (x)", "PPL (x)"))]
    first = piped([[*heads, "same top token", "seconds"], *(cells(row, texts, base) for row in rows)])
    return f"{first}\n\n{piped(summary_lines(rows, base, ' ± '))}"


def merged(results: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows of several files, each once, in the order of the first that has it."""
    known: dict[str, Any] = {}
    for result in results:
        for name, model in result["models"].items():
            read = {text: digest for text, digest in model["windows"].items() if text.startswith("text ")}
            if known.setdefault(name, (model["files"], read)) != (model["files"], read):
                raise SystemExit(f"{name} is another model in two of the files, or was measured on other windows")
    found = {(row["model"], row["calibration"], row["recipe"]): row for result in results for row in result["rows"]}
    return list(found.values())


def models(rows: Iterable[Row]) -> list[str]:
    """Those with at least one row that has figures."""
    return list(dict.fromkeys(row["model"] for row in rows if "error" not in row))


def cells(row: Row, texts: Sequence[str], base: str) -> list[str]:
    """The line of a row in Markdown."""
    begin = [row["model"], row["calibration"], row["recipe"]]
    if "error" in row:
        return [*begin, row["error"].replace("|", "\\|").replace("\n", " "), *[""] * (2 * len(texts) + 1)]
    found = begin
    for one in (row["texts"].get(text) for text in texts):
        if one is None:
            found += ["", ""]
            continue
        beside = "1" if row["recipe"] == base else shown(one.get("kl_ratio"), one.get("kl_ratio_error"))
        found.append(f"{one['kl']:.4f}" + (f" ({beside})" if beside else ""))
        found.append(f"{one['perplexity']:.2f} ({one['perplexity_ratio']:.3f})")
    same = [one["agreement"] for one in row["texts"].values()]
    return [*found, f"{100 * sum(same) / len(same):.1f} %", f"{row['seconds']:.1f}"]


def summary_cells(one: Row, names: Sequence[str], sign: str) -> list[str]:
    """The line of a recipe over models and texts."""
    begin = [one["calibration"], one["recipe"]]
    if not one["cases"]:
        return [*begin, *[""] * (len(names) + 3)]
    each = [one["of_model"].get(name, {"geometric_mean": None, "geometric_mean_error": None}) for name in names]
    over = [shown(found["geometric_mean"], found["geometric_mean_error"], sign=sign) for found in [*each, one]]
    if one["error_over_seeds"] is not None:
        over[-1] += f", seeds{sign}{one['error_over_seeds']:.3f}"
    most = one["largest"]
    where = f"{most['model']}, {most['text']}" + ("" if most["calibration"] in begin else f", {most['calibration']}")
    largest = shown(most["kl_ratio"], most["kl_ratio_error"], sign=sign)
    return [*begin, *over, f"{largest} ({where})", f"{one['below_one']} of {one['cases']}"]


def summary_lines(rows: Sequence[Row], base: str, sign: str) -> list[list[str]]:
    """One for each recipe after each calibration, the heads first."""
    heads = ["calibrated on", "recipe", *models(rows), "all", "largest", "below 1"]
    return [heads, *(summary_cells(one, models(rows), sign) for one in summaries(rows, base))]


def piped(lines: Sequence[Sequence[str]]) -> str:
    """Markdown of these lines, of which the first are heads."""
    shown = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([shown[0], "|---" * len(lines[0]) + "|", *shown[1:]])


def terminal(rows: Sequence[Row], base: str) -> str:
    """For each model and calibration a line for each text and recipe; then what holds over all of them."""
    parts = []
    for model, calibration in dict.fromkeys((row["model"], row["calibration"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["calibration"]) == (model, calibration)]
        parts.append(aligned(f"{model}, calibrated on {calibration}", text_lines(mine, base)))
    parts.append(aligned(f"KL over that of {base}, geometric means over texts", summary_lines(rows, base, "±")))
    return "\n\n".join(parts)


def text_lines(rows: Sequence[Row], base: str) -> list[list[str]]:
    """Of one model and calibration, its heads first."""
    lines = [["text (windows)", "recipe", "KL", f"x {base}", "PPL", "x original", "same top", "seconds"]]
    for text in dict.fromkeys(text for row in rows for text in row.get("texts", {})):
        for place, row in enumerate(row for row in rows if text in row.get("texts", {})):
            one = row["texts"][text]
            if not place:
                lines.append(
                    [f"{text} ({one['windows']})", "original", "", "", f"{one['original_perplexity']:.2f}", "", "", ""]
                )
            lines.append(
                [
                    "",
                    row["recipe"],
                    shown(one["kl"], one["kl_error"], 4, "±"),
                    "1" if row["recipe"] == base else shown(one.get("kl_ratio"), one.get("kl_ratio_error"), sign="±"),
                    f"{one['perplexity']:.2f}",
                    shown(one["perplexity_ratio"], one["perplexity_ratio_error"], 3, "±"),
                    shown(100 * one["agreement"], None, 1) + " %",
                    f"{row['seconds']:.1f}",
                ]
            )
    return lines + [["", row["recipe"], f"FAILED: {row['error']}"] for row in rows if "error" in row]


def aligned(title: str, lines: Sequence[Sequence[str]]) -> str:
    """Columns, the first two to the left and numbers to the right; a last cell may be as long as it likes."""
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[place]) for line in full) for place in range(len(lines[0]))]
    placed_lines = [title]
    for line in lines:
        placed = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        placed_lines.append("  ".join(placed).rstrip())
    return "\n".join(placed_lines)
