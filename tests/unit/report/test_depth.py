"""Errors through depth: means over experts, what is far off, and names that stay apart."""

from __future__ import annotations

import pytest

from mxrot.report.depth import error_map
from mxrot.report.far import far_off


def test_a_map_has_a_row_a_linear_and_the_mean_over_experts() -> None:
    found = error_map(
        [
            (0, "self_attn.q_proj", 0.1),
            (0, "mlp.experts.0.up_proj", 0.2),
            (0, "mlp.experts.1.up_proj", 0.4),
            (2, "self_attn.q_proj", 0.3),
            (2, "mlp.experts.1.up_proj", None),
        ]
    )
    assert found is not None
    assert (found.names, found.blocks) == (["q_proj", "up_proj"], [0, 2])
    assert found.values == [[0.1, 0.3], [pytest.approx(0.3), None]]
    assert error_map([(0, "q_proj", None)]) is None


def test_linears_of_one_last_name_keep_the_whole() -> None:
    found = error_map([(0, "mlp.experts.3.up_proj", 0.2), (0, "mlp.shared.up_proj", 0.1)])
    assert found is not None and found.names == ["mlp.experts.*.up_proj", "mlp.shared.up_proj"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.0, 1.51], [False, False, True]),
        ([1.0, 1.0, 1.5], [False, False, False]),
        ([None, 1.0, 9.0, 1.0], [False, False, True, False]),
        ([None], [False]),
        ([], []),
    ],
)
def test_far_off_is_beside_the_median(values: list[float | None], expected: list[bool]) -> None:
    assert far_off(values) == expected
