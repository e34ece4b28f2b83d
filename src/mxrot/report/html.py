"""The page of a report: one file that loads nothing else, and runs nothing.

Whatever comes from a checkpoint or a command line is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from mxrot.report.contents import Contents
from mxrot.report.drawing import DARK, LIGHT, Palette, Picture, inline_svg
from mxrot.report.plans import cache_line
from mxrot.report.tables import choice_line, rotation_line, sites_choice_line, tuning_line

_PAGE = Path(__file__).with_name("page.html")
_METRIC_HEADINGS = ("", "original", "quantized", "difference")
_INPUT_BYTES = 2
"""A weight of the original, in its 16-bit type."""


def page(contents: Contents, pictures: dict[str, Picture]) -> str:
    """The HTML of a report; `pictures` are those of `plots.pictures`."""
    drawn = {name: inline_svg(name, picture) for name, picture in pictures.items()}
    sections = (_heading, _accuracy, _depth, _activations, _weights, _size, _making)
    filled = Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{contents.name}, {contents.recipe.name}"),
        light=_variables(LIGHT),
        dark=_variables(DARK),
        body="\n".join(section(contents, drawn) for section in sections),
    )
    return filled.encode("utf-8", "xmlcharrefreplace").decode()  # a path need not be UTF-8


def _variables(palette: Palette) -> str:
    return " ".join(f"--{name}: {color};" for name, color in palette.named().items())


def _heading(contents: Contents, drawn: dict[str, str]) -> str:
    recipe, size = contents.recipe, contents.run["size"]
    tiles = [(f"{size['bits_per_weight']:.2f}", "bits a weight of the blocks, scales included")]
    tiles.append((f"{size['total_bytes'] / 1e6:,.1f} MB", f"{_original_bytes(contents) / 1e6:,.1f} MB in 16 bit"))
    for metric in contents.metrics:
        if metric.measure == "perplexity":
            beside = "" if metric.original is None else f", original {metric.original:.2f}"
            tiles.insert(0, (f"{metric.value:.2f}", f"perplexity, {metric.name}{beside}"))
    tiles.append((f"{contents.run['seconds']:,.0f} s", f"to quantize, on {contents.run['device']}"))
    shown = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(t)}</span></div>' for b, t in tiles)
    return (
        f"<h1>{escape(contents.name)}</h1>\n"
        f'<p class="soft">Quantized with mxrot, recipe <code>{escape(recipe.name)}</code>: {escape(recipe.formats)}. '
        f"{escape(recipe.summary)}"
        f"{'.' if recipe.summary else ''}</p>\n"
        f'<div class="tiles">{shown}</div>'
    )


def _accuracy(contents: Contents, drawn: dict[str, str]) -> str:
    rows = []
    for metric in contents.metrics:
        name, measure, *numbers, counted = metric.cells
        note = "".join(f"<small>{escape(part)}</small>" for part in (measure, counted) if part)
        rows.append([f"{escape(name)}{note}", *(_with_error_below(number) for number in numbers)])
    return f"<h2>Accuracy</h2>\n<p>{escape(contents.measured)}</p>\n" + _table(_METRIC_HEADINGS, rows)


def _depth(contents: Contents, drawn: dict[str, str]) -> str:
    captions = {
        "weight_error": "What rounding does to the weights, after the transform was folded into them.",
        "output_error": "What all of it does to the output, on the calibration text.",
        "input_error": "What rounding alone does to the inputs, with the transform and, dashed, without it: "
        "mean over tokens.",
    }
    shown = [_figure(drawn[name], caption) for name, caption in captions.items() if name in drawn]
    figures = "\n".join(f'<div class="card">{figure}</div>' for figure in shown)
    linears = [linear for block in contents.run["blocks"] for linear in block["linears"]]
    rows = [
        [
            escape(linear["name"]),
            " × ".join(str(int(number)) for number in linear["shape"]),
            _number(linear["weight_error"]),
            _number(linear["output_error"]),
            _number(linear["damping"], "g"),
        ]
        for linear in linears
    ]
    table = _table(("linear", "shape", "weights", "output", "damping"), rows)
    return (
        "<h2>Error through depth</h2>\n<p>Relative error in the Frobenius norm, 0 is none; mean over the linears of a "
        f'site, which are those that read the same input.</p>\n<div class="grid">{figures}</div>\n'
        f"<details><summary>All {len(rows)} linears as a table</summary>{table}</details>"
    )


def _activations(contents: Contents, drawn: dict[str, str]) -> str:
    cards, recipe = [], contents.recipe
    for name in contents.chosen:
        before, after = contents.before[name], contents.after[name]
        rows = [
            ["largest |x|", f"{before.largest:.4g}", f"{after.largest:.4g}"],
            ["median |x|", f"{before.median:.4g}", f"{after.median:.4g}"],
            ["block maximum over its RMS", f"{before.crest:.2f}", f"{after.crest:.2f}"],
        ]
        if before.rounding_error is not None:
            rows.append(["rounding error", _number(before.rounding_error), _number(after.rounding_error)])
        cards.append(
            f'<div class="card"><h3>{escape(name)}</h3>'
            f"{_figure(drawn[f'magnitudes-{name}'])}{_figure(drawn[f'maxima-{name}'])}"
            f"{_table(('', 'before', 'after'), rows)}</div>"
        )
    where = "in the original model"
    if not contents.before_is_original:
        where = "in this model, without the transform"
        where += "" if recipe.smoothing is None else " but with the smoothing that is in its norms"
        where += "" if recipe.rotation is None else " but with the rotations that are in its weights"
    is_changed = recipe.has_transform or recipe.smoothing or recipe.rotation
    unchanged = "" if is_changed else " This recipe changes no input."
    about = (
        f"<p>Before is the input of a site {where}; after is what is rounded.{unchanged} {escape(contents.looked_at)} "
        "A map shows the first tokens of it, and of neighbouring channels the largest. Values are in units of the "
        "median of |x| before and after, because smoothing moves whole channels; both maps of a site have the same "
        "colours.</p>"
    )
    return f'<h2>Activations</h2>\n{about}\n<div class="pairs">{"".join(cards)}</div>'


def _weights(contents: Contents, drawn: dict[str, str]) -> str:
    if "exponents" not in drawn:
        return ""
    caption = "Each block of 32 weights has one scale, a power of two; all decoder blocks together."
    return f'<h2>Weights</h2>\n<div class="pairs"><div class="card">{_figure(drawn["exponents"], caption)}</div></div>'


def _size(contents: Contents, drawn: dict[str, str]) -> str:
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
    table = _table(("", "MB", ""), rows, wide_last=True)
    return (
        "<h2>Size and memory</h2>\n<p>On disk; on a GPU the model takes about as much, and what its inputs and the "
        f"key-value cache take. {escape(took)}.</p>\n{cache}{table}"
    )


def _making(contents: Contents, drawn: dict[str, str]) -> str:
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
    commands = "".join(f"<p>{escape(what)}</p><pre>{_words(command)}</pre>" for what, command in contents.commands)
    files = [[escape(name), escape(str(entry["sha256"]))] for name, entry in sorted(run["files"].items())]
    return (
        f"<h2>How it was made</h2>\n{_table(('', ''), rows, is_text=True)}\n{commands}\n"
        f"<h3>recipe.toml</h3><pre>{escape(contents.recipe.to_toml())}</pre>\n"
        f"<details><summary>SHA-256 of {len(files)} files</summary>{_table(('', ''), files, is_text=True)}</details>"
    )


def _original_bytes(contents: Contents) -> int:
    size = contents.run["size"]
    return int(size["other_bytes"] + _INPUT_BYTES * size["quantized_weights"])


def _words(command: str) -> str:
    """Each word in one piece: a browser may break a line after any hyphen."""
    return " ".join(f'<span class="word">{escape(word)}</span>' for word in command.split(" "))


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def _with_error_below(number: str) -> str:
    value, plus_minus, error = number.partition(" ± ")
    return escape(value) + (f"<small>± {escape(error)}</small>" if plus_minus else "")


def _number(value: float | None, style: str = ".4f") -> str:
    return "" if value is None else f"{value:{style}}"


def _figure(svg: str, caption: str = "") -> str:
    return f"<figure>{svg}{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"


def _table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], wide_last: bool = False, is_text: bool = False
) -> str:
    """A table of cells that are HTML already; it scrolls by itself where it is too wide."""
    text = ' class="text"' if is_text else ""
    top = "".join(f"<th{text}>{escape(heading)}</th>" for heading in headings)
    body = []
    for row in rows:
        last = ' class="track"' if wide_last else text
        cells = "".join(f"<td{text}>{cell}</td>" for cell in row[:-1]) + f"<td{last}>{row[-1]}</td>"
        body.append(f"<tr>{cells}</tr>")
    head = f"<thead><tr>{top}</tr></thead>" if any(headings) else ""
    return f'<div class="scroll"><table>{head}<tbody>{"".join(body)}</tbody></table></div>'
