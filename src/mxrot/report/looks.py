"""The parts of a report that show the differences between a quantized model and the original, with their pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape

from mxrot.report.contents import Contents, ShownPassage
from mxrot.report.elements import Cell, Drawn, details, figure, number, table
from mxrot.report.far import FAR, FAR_CHANNEL, far_off
from mxrot.report.outliers import Outlier, outlier_channels, outlier_tokens
from mxrot.report.plots import ERRORS

_CAPTIONS = {"surface": "|x| beside the median; of neighbouring tokens and channels the largest."}
_MOST_HEAT = 3.0
"""The colour is full from this KL on, in nats per token."""


def passage_part(contents: Contents, drawn: Drawn) -> str:
    """The passage where the models differ most, with its tokens coloured by KL, and both continuations."""
    passage = contents.passage
    if passage is None:
        return ""
    strip = "".join(
        f'<span class="token{" other" if original != quantized else ""}" style="--heat: {_heat(kl):.2f}" '
        f'data-said="{escape(said)}">{escape(text)}</span>'
        for (_, text, kl, original, quantized), said in zip(passage.rows, passage.said, strict=True)
    )
    rows: list[list[str | Cell]] = [
        [str(at), _shown(text), number(kl, ".3f", kl > 1), _shown(original), _shown(quantized)]
        for at, text, kl, original, quantized in passage.rows
    ]
    headings = ("position", "token", "KL", "original expected", "quantized expected")
    text = "".join(row[1] for row in passage.rows)
    said = [("the text", text), ("the original", passage.original), ("quantized", passage.quantized)]
    sides = "".join(f"<div><h3>{name}</h3><p>{escape(words)}</p></div>" for name, words in said)
    return (
        f"<p>{escape(passage.where)} Of all its passages it has the largest mean KL, {_mean_kl(passage):.3g} nats a "
        "token. The deeper the colour, the further apart the models are about that token; where it is underlined, "
        "their most likely tokens differ.</p>\n"
        f'<p class="passage"><span class="soft">{escape(passage.context)}</span>{strip}</p>\n'
        f'<div class="grid"><div class="card">{figure(drawn["passage"])}</div></div>\n'
        f"<p>After the text before it, this comes next, and this is what each model would have said:</p>\n"
        f'<div class="says">{sides}</div>\n' + details("Token by token", table(headings, rows, is_sortable=True))
    )


def depth_part(contents: Contents, drawn: Drawn) -> str:
    """Errors by block and linear, and by site."""
    captions = {
        "weight_error-map": "Each linear of each block, weights. A dot marks what is far off.",
        "output_error-map": "The same for the outputs.",
        "weight_error": "What rounding does to the weights, after the transform was folded into them.",
        "output_error": "What all of it does to the output, on the calibration text.",
        "input_error": "What rounding alone does to the inputs, with the transform and, dashed, without it: "
        "mean over tokens.",
    }
    shown = [figure(drawn[name], caption) for name, caption in captions.items() if name in drawn]
    figures = "\n".join(f'<div class="card">{each}</div>' for each in shown)
    far = {key: _far_linears(contents, key) for key in ERRORS}
    rows: list[list[str | Cell]] = [
        [
            escape(linear["name"]),
            " × ".join(str(int(side)) for side in linear["shape"]),
            *(number(linear[key], is_far=linear["name"] in far[key]) for key in ERRORS),
            number(linear["damping"], "g"),
        ]
        for linear in contents.linears
    ]
    found = sum(len(names) for names in far.values())
    count = "none is" if not found else f"{found} {'is' if found == 1 else 'are'}"
    listed = table(("linear", "shape", "weights", "output", "damping"), rows, is_sortable=True)
    return (
        "<p>Relative error in the Frobenius norm, 0 is none; mean over the linears of a site, which are those that "
        f'read the same input. <span class="far">Far off</span> is more than {FAR:g} times the median of the same '
        f'linear over the blocks; of {2 * len(rows)} errors {count}.</p>\n<div class="pairs">{figures}</div>\n'
        + details(f"All {len(rows)} linears as a table", listed)
    )


def _far_linears(contents: Contents, key: str) -> set[str]:
    """Names of the linears whose error is far off among those of the same name in the other blocks."""
    by_kind: dict[str, list[tuple[str, float | None]]] = {}
    for linear in contents.linears:
        kind = re.sub(r"\.\d+\.", ".*.", contents.place_of(linear["name"])[1])
        by_kind.setdefault(kind, []).append((linear["name"], linear[key]))
    return {
        name
        for each in by_kind.values()
        for (name, _), is_far in zip(each, far_off([value for _, value in each]), strict=True)
        if is_far
    }


def activations_part(contents: Contents, drawn: Drawn) -> str:
    """The inputs of the chosen sites before and after the transform."""
    cards, recipe = [], contents.recipe
    for name in contents.chosen:
        before, after = contents.before[name], contents.after[name]
        rows = [
            ["largest |x|", f"{before.largest:.4g}", f"{after.largest:.4g}"],
            ["median |x|", f"{before.median:.4g}", f"{after.median:.4g}"],
            ["block maximum over its RMS", f"{before.crest:.2f}", f"{after.crest:.2f}"],
        ]
        if before.rounding_error is not None and after.rounding_error is not None:
            rows.append(["rounding error", f"{before.rounding_error:.4f}", f"{after.rounding_error:.4f}"])
        kinds = [kind for kind in ("magnitudes", "surface", "maxima") if f"{kind}-{name}" in drawn]
        figures = "".join(figure(drawn[f"{kind}-{name}"], _CAPTIONS.get(kind, "")) for kind in kinds)
        cards.append(f'<div class="card"><h3>{escape(name)}</h3>{figures}{table(("", "before", "after"), rows)}</div>')
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
    return f'{about}\n<div class="pairs">{"".join(cards)}</div>'


def outliers_part(contents: Contents) -> str:
    """The channels and tokens that stick out, in the chosen sites and in all."""
    headings = ("site", "channels before", "× median", "channels after", "× median", "tokens before", "× median")
    named = {
        name: [
            f'<span class="site">{escape(name.removeprefix(f"{contents.family.blocks}."))}</span>',
            *(cell for view in (before, after) for cell in _named(outlier_channels(view), str)),
            *_named(outlier_tokens(before, contents.tokens), lambda index: _token(contents, index)),
        ]
        for name, before in contents.before.items()
        if (after := contents.after.get(name)) is not None
    }
    chosen = [named[name] for name in contents.chosen]
    return (
        "<p>The channels and tokens with the largest |x| of each site, by their numbers from 0, and how many times the "
        f'median channel or token the first is. <span class="far">Far off</span> is {FAR_CHANNEL:g} times and more. Of '
        "experts no tokens are told, for each sees other ones.</p>\n"
        f"{table(headings, chosen, is_sortable=True)}\n"
        + details(f"All {len(named)} sites", table(headings, named.values(), is_sortable=True))
    )


def _named(outliers: Sequence[Outlier], named: Callable[[int], str]) -> list[str | Cell]:
    """Their names, and how far the first sticks out."""
    if not outliers:
        return ["", ""]
    times = outliers[0].times
    return [
        Cell(", ".join(named(each.number) for each in outliers), is_text=True),
        number(times, ".1f", times >= FAR_CHANNEL),
    ]


def _token(contents: Contents, index: int) -> str:
    return f"{index} {_shown(contents.tokens[index])}"


def _shown(token: str) -> str:
    """A token with visible spaces and line ends."""
    return f"<code>{escape(repr(token))}</code>"


def _heat(kl: float) -> float:
    return max(0.0, min(1.0, kl / _MOST_HEAT))


def _mean_kl(passage: ShownPassage) -> float:
    values = [row[2] for row in passage.rows]
    return sum(values) / len(values)


def weights_part(drawn: Drawn) -> str:
    """The distribution of weights and of their scales."""
    captions = {
        "weights": "All decoder blocks together; quantized is after the transform. The first and the last bin "
        "also hold what is beyond.",
        "exponents": "Each block of 32 weights has one scale, a power of two; all decoder blocks together.",
    }
    cards = [f'<div class="card">{figure(drawn[name], text)}</div>' for name, text in captions.items() if name in drawn]
    return f'<div class="pairs">{"".join(cards)}</div>' if cards else ""
