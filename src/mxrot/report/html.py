"""The page of a report. `elements` describes what it loads and runs.

Text from a checkpoint or a command line is escaped.
"""

from __future__ import annotations

from html import escape

from mxrot.report.contents import Contents
from mxrot.report.drawing import Picture
from mxrot.report.elements import Section, command_words, details, drawn_for_page, page_of, table, tiles
from mxrot.report.looks import activations_part, depth_part, outliers_part, passage_part, weights_part
from mxrot.report.plans import cache_line
from mxrot.report.tables import choice_line, rotation_line, sites_choice_line, tuning_line

_METRIC_HEADINGS = ("", "original", "quantized", "difference")
_INPUT_BYTES = 2
"""The bytes of a weight of the original, in its 16-bit type."""


def page(contents: Contents, pictures: dict[str, Picture]) -> str:
    """The HTML of a report. `pictures` are those of `plots.pictures`."""
    drawn = drawn_for_page(pictures)
    sections = [
        Section("Accuracy", _accuracy(contents)),
        Section("Worst passage", passage_part(contents, drawn)),
        Section("Error through depth", depth_part(contents, drawn)),
        Section("Activations", activations_part(contents, drawn)),
        Section("Outliers", outliers_part(contents)),
        Section("Weights", weights_part(drawn)),
        Section("Size and memory", _size(contents)),
        Section("How it was made", _making(contents)),
    ]
    return page_of(f"{contents.name}, {contents.recipe.name}", _heading(contents), sections)


def _heading(contents: Contents) -> str:
    recipe, size = contents.recipe, contents.run["size"]
    shown = [(f"{size['bits_per_weight']:.2f}", "bits a weight of the blocks, scales included")]
    shown.append((f"{size['total_bytes'] / 1e6:,.1f} MB", f"{_original_bytes(contents) / 1e6:,.1f} MB in 16 bit"))
    for metric in contents.metrics:
        if metric.measure == "perplexity":
            beside = "" if metric.original is None else f", original {metric.original:.2f}"
            shown.insert(0, (f"{metric.value:.2f}", f"perplexity, {metric.name}{beside}"))
    shown.append((f"{contents.run['seconds']:,.0f} s", f"to quantize, on {contents.run['device']}"))
    links = "".join(f' <a href="{escape(address)}">{escape(words)}</a>' for words, address in contents.links)
    return (
        f"<h1>{escape(contents.name)}</h1>\n"
        f'<p class="soft">Quantized with mxrot, recipe <code>{escape(recipe.name)}</code>: {escape(recipe.formats)}. '
        f"{escape(recipe.summary)}"
        f"{'.' if recipe.summary else ''}</p>\n"
        f'<p class="soft">Report of {escape(contents.made)}.{links}</p>\n'
        f"{tiles(shown)}"
    )


def _accuracy(contents: Contents) -> str:
    rows = []
    for metric in contents.metrics:
        name, measure, *numbers, counted = metric.cells
        note = "".join(f"<small>{escape(part)}</small>" for part in (measure, counted) if part)
        rows.append([f"{escape(name)}{note}", *(_with_error_below(number) for number in numbers)])
    return f"<p>{escape(contents.measured)}</p>\n" + table(_METRIC_HEADINGS, rows)


def _size(contents: Contents) -> str:
    run, size = contents.run, contents.run["size"]
    whole = _original_bytes(contents)
    parts = (
        ("codes", size["code_bytes"]),
        ("scales", size["scale_bytes"]),
        ("transforms", size["transform_bytes"]),
        ("everything else, as it was", size["other_bytes"]),
        ("together", size["total_bytes"]),
        ("the original in 16 bit", whole),
    )
    cache = "" if contents.cache is None else f"<p>{escape(cache_line(contents.cache))}.</p>"
    rows = [
        [name, f"{count / 1e6:,.2f}", f'<span class="bar" style="width: {100 * count / whole:.2f}%"></span>']
        for name, count in parts
    ]
    peak = run.get("peak_gpu_bytes")
    took = f"Quantizing took {run['seconds']:.1f} s on {run['device']}"
    took += "" if peak is None else f", with {peak / 1e9:.2f} GB of its memory at most"
    shown = table(("", "MB", ""), rows, wide_last=True)
    return (
        "<p>On disk; on a GPU the model takes about as much, and what its inputs and the "
        f"key-value cache take. {escape(took)}.</p>\n{cache}{shown}"
    )


def _making(contents: Contents) -> str:
    run = contents.run
    facts = [("seed", str(run["seed"])), ("device", str(run["device"]))]
    if data := run.get("data"):
        facts.append(("calibration text", f"{data.get('text')}, SHA-256 {data.get('sha256')}"))
    if run.get("windows"):
        facts.append(("calibration windows", " of ".join(map(str, run["windows"])) + " tokens"))
    if rotated := rotation_line(run):
        facts.append(("rotations", rotated))
    if chosen := choice_line(run):
        facts.append(("choice", chosen))
    if strengths := sites_choice_line(run):
        facts.append(("target of sites", strengths))
    if tuned := tuning_line(run):
        facts.append(("tuning", tuned))
    facts += [("versions", _listed(run["versions"])), ("versions, this report", _listed(contents.versions))]
    rows = [[escape(name), escape(value)] for name, value in facts]
    commands = "".join(
        f"<p>{escape(what)}</p><pre>{command_words(command)}</pre>" for what, command in contents.commands
    )
    files = [[escape(name), escape(str(entry["sha256"]))] for name, entry in sorted(run["files"].items())]
    return (
        f"{table(('', ''), rows, is_text=True)}\n{commands}\n"
        f"<h3>recipe.toml</h3><pre>{escape(contents.recipe.to_toml())}</pre>\n"
        + details(f"SHA-256 of {len(files)} files", table(("", ""), files, is_text=True))
    )


def _original_bytes(contents: Contents) -> int:
    size = contents.run["size"]
    return int(size["other_bytes"] + _INPUT_BYTES * size["quantized_weights"])


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def _with_error_below(number: str) -> str:
    value, plus_minus, error = number.partition(" ± ")
    return escape(value) + (f"<small>± {escape(error)}</small>" if plus_minus else "")
