import pytest
import torch
from tests.unit.checkpoint.folders import recipe

from mxrot.calibration import Manner
from mxrot.calibration.manner import Kinds
from mxrot.errors import ConfigError
from mxrot.text import Turns

TURNS = Turns((1,), (2,), (3,))


def test_each_sequence_is_of_one_kind_and_each_kind_is_spread() -> None:
    kinds = Kinds.of(Manner(prompted=0.25, chats=0.5, turns=TURNS), 40, has_text=True)
    assert torch.cat([kinds.prompted, kinds.chats, kinds.free]).sort().values.tolist() == list(range(40))
    assert (len(kinds.prompted), len(kinds.chats), len(kinds.free)) == (10, 20, 10)
    for rows, apart in ((kinds.prompted, 4), (kinds.chats, 3), (kinds.free, 5)):
        assert rows[0] < 5 and rows[-1] > 34 and rows.diff().max() <= apart


@pytest.mark.parametrize(
    ("text", "turns", "counts"), [(False, TURNS, (0, 5)), (True, None, (3, 0)), (False, None, (0, 0))]
)
def test_without_a_text_or_a_template_text_is_free(text: bool, turns: Turns | None, counts: tuple[int, int]) -> None:
    kinds = Kinds.of(Manner(prompted=0.3, chats=0.5, turns=turns), 10, has_text=text)
    assert (len(kinds.prompted), len(kinds.chats)) == counts and len(kinds.free) == 10 - sum(counts)


def test_shares_that_round_to_more_than_there_are() -> None:
    kinds = Kinds.of(Manner(prompted=0.5, chats=0.5, turns=TURNS), 3, has_text=True)
    assert (len(kinds.prompted), len(kinds.chats), len(kinds.free)) == (2, 1, 0)


def test_each_kind_has_every_temperature() -> None:
    kinds = Kinds.of(Manner(prompted=0.5, chats=0.25, turns=TURNS), 16, has_text=True)
    found = kinds.temperatures((0.5, 1.0))
    assert found is not None and found.shape == (16, 1)
    for rows in (kinds.prompted, kinds.chats, kinds.free):
        assert sorted(found[rows, 0].tolist()) == [0.5] * (len(rows) // 2) + [1.0] * (len(rows) // 2)
    assert kinds.temperatures((1.0, 1.0)) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chats": 0.6, "prompted": 0.5}, "together at most 1"),
        ({"chats": -0.1}, "shares from 0 to 1"),
        ({"temperatures": ()}, "at least one"),
        ({"temperatures": (1.0, 0.0)}, "positive"),
        ({"temperatures": ("hot",)}, "expected float"),
        ({"temperatures": 1.0}, "expected a list of numbers"),
        ({"first": "any"}, "not one of"),
    ],
)
def test_what_a_recipe_may_not_say(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe("mxrot", **{f"calibration__{key}": value for key, value in changes.items()})
