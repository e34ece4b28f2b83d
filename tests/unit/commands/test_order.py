"""Which lines of `inspect` come first."""

from __future__ import annotations

from typing import Any

import pytest

from mxrot.commands.order import check_sort, first_errors, first_sites
from mxrot.errors import ConfigError
from mxrot.evaluation.inspection import SiteMaxima

SITES = [
    SiteMaxima("m.0.q", 32, 4.0, 1, 2.0),
    SiteMaxima("m.1.q", 32, 3.0, 1, 0.5),
    SiteMaxima("m.2.q", 32, 9.0, 1, 9.0),
]


def linear(name: str, weights: float, output: float | None) -> dict[str, Any]:
    return {"name": name, "weight_error": weights, "output_error": output}


BLOCKS = [
    {"linears": [linear("m.0.experts.0.up", 0.1, 0.5), linear("m.0.experts.1.up", 0.2, 0.6)]},
    {"linears": [linear("m.1.down", 0.3, None)]},
]


def sites(key: str, top: int | None) -> list[str]:
    return [site.site for site in first_sites(SITES, key, top, "m.")]


def errors(key: str, top: int | None) -> list[str]:
    blocks: list[dict[str, Any]] = first_errors(BLOCKS, key, top, "m.")
    return [one["name"] for block in blocks for one in block["linears"]]


def test_sites() -> None:
    assert sites("model", None) == ["0.q", "1.q", "2.q"] and sites("model", 2) == ["0.q", "1.q"]
    assert sites("ratio", None) == ["1.q", "0.q", "2.q"]
    assert sites("largest", 1) == ["2.q"] and sites("median", 2) == ["2.q", "0.q"]
    assert sites("output", None) == ["0.q", "1.q", "2.q"] and sites("output", 1) == ["1.q"]


def test_errors_show_the_worst_expert() -> None:
    assert errors("model", None) == ["0.experts.0.up", "0.experts.1.up", "1.down"]
    assert errors("model", 1) == ["0.experts.0.up"]
    assert errors("output", None) == ["0.experts.1.up", "1.down"]
    assert errors("weights", 2) == ["1.down", "0.experts.1.up"]
    assert errors("ratio", 1) == ["0.experts.1.up"]


def test_an_unknown_column_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--sort: .*ration.*ratio"):
        check_sort("ration")
