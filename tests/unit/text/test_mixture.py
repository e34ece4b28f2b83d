from typing import Any

import pytest
import torch

from mxrot.errors import ConfigError
from mxrot.text import Reader, Text, TokenWindows, mixed_windows, split_by_weight


class Letters:
    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    ("count", "weights", "parts"),
    [
        (8, [1.0], [8]),
        (8, [3.0, 1.0], [6, 2]),
        (10, [1.0, 1.0, 1.0], [4, 3, 3]),
        (7, [0.5, 0.25, 0.25], [3, 2, 2]),
        (1, [1.0, 2.0], [0, 1]),
        (128, [0.001, 1.0], [0, 128]),
    ],
)
def test_shares(count: int, weights: list[float], parts: list[int]) -> None:
    assert split_by_weight(count, weights) == parts


@pytest.mark.parametrize("count", range(1, 40))
def test_shares_are_all_of_it_and_within_one(count: int) -> None:
    weights = [0.7, 2.0, 1 / 3, 5.0]
    parts = split_by_weight(count, weights)
    assert sum(parts) == count
    assert all(abs(part - count * weight / sum(weights)) < 1 for part, weight in zip(parts, weights, strict=True))


def test_each_text_gives_evenly_spaced_windows() -> None:
    texts = [Text("a", "aabbccdd"), Text("b", "vvwwxxyyzz", weight=2.0)]
    found = mixed_windows(texts, Reader(Letters()), 2, 6)
    assert [["".join(map(chr, row)) for row in part.ids.tolist()] for part in found] == [
        ["aa", "cc"],
        ["vv", "ww", "xx", "yy"],
    ]


def test_a_short_text_is_not_made_up_for() -> None:
    found = mixed_windows([Text("a", "aab"), Text("b", "vv" * 9)], Reader(Letters()), 2, 8)
    assert [(len(part.ids), part.asked, part.left_out) for part in found] == [(1, 4, 1), (4, 4, 0)]


def test_what_cannot_be_mixed() -> None:
    reader = Reader(Letters())
    with pytest.raises(ConfigError, match="a: its share is none of 1 windows over 2 texts"):
        mixed_windows([Text("a", "aa"), Text("b", "bb", weight=3.0)], reader, 2, 1)
    with pytest.raises(ConfigError, match="windows of 3 tokens, and seq_len is 2"):
        mixed_windows([Text("a", TokenWindows(torch.ones(2, 3, dtype=torch.int64)))], reader, 2, 1)
    with pytest.raises(ConfigError, match="number of windows must be positive"):
        mixed_windows([Text("a", "aa")], reader, 2, 0)
