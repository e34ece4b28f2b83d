"""The pictures of a report, each drawn on a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Sequence

from mxrot.evaluation import ActivationView
from mxrot.report.activation_plots import magnitudes_picture, maxima_picture, surface_picture
from mxrot.report.contents import Contents
from mxrot.report.depth import Depth, depth_picture, error_map, map_picture
from mxrot.report.drawing import Picture
from mxrot.report.passage_plot import passage_picture
from mxrot.report.weight_plots import exponents_picture, histograms_picture

ERRORS = {"weight_error": "Weights", "output_error": "Outputs of the linears"}


def pictures(contents: Contents) -> dict[str, Picture]:
    """All pictures by name."""
    linears = contents.linears
    found: dict[str, Picture] = {}
    for key, title in ERRORS.items():
        depth = _by_depth(contents, [(linear["name"], linear[key]) for linear in linears if linear[key] is not None])
        if depth:
            found[key] = depth_picture(title, depth)
    for key, title in ERRORS.items():
        errors = error_map([(*contents.place_of(linear["name"]), linear[key]) for linear in linears])
        if errors is not None:
            found[f"{key}-map"] = map_picture(title, errors)
    before, after = (_rounding_errors(contents, views) for views in (contents.before, contents.after))
    if after:
        found["input_error"] = depth_picture("Rounding of the inputs", after, before)
    if contents.passage is not None:
        found["passage"] = passage_picture(contents.passage)
    for name in contents.chosen:
        pair = contents.before[name], contents.after[name]
        found[f"magnitudes-{name}"] = magnitudes_picture(pair)
        if contents.has_surfaces:
            found[f"surface-{name}"] = surface_picture(pair)
        found[f"maxima-{name}"] = maxima_picture(pair)
    if contents.weights:
        found["weights"] = histograms_picture(contents.weights, contents.original_weights)
    if contents.exponents:
        found["exponents"] = exponents_picture(contents.exponents)
    return found


def _rounding_errors(contents: Contents, views: dict[str, ActivationView]) -> Depth:
    errors = [(name, view.rounding_error) for name, view in views.items() if view.rounding_error is not None]
    return _by_depth(contents, errors)


def _by_depth(contents: Contents, values: Sequence[tuple[str, float]]) -> Depth:
    """Means over the linears of a site, by site and block."""
    sums: dict[str, dict[int, list[float]]] = {}
    for linear, value in values:
        block, site = contents.site_of(linear)
        sums.setdefault(site, {}).setdefault(block, []).append(value)
    return {site: {block: sum(x) / len(x) for block, x in blocks.items()} for site, blocks in sums.items()}
