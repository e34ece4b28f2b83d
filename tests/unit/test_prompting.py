from types import SimpleNamespace
from typing import Any

import pytest

from mxrot.errors import ConfigError
from mxrot.prompting import new_tokens, position_count


def config(**fields: Any) -> Any:
    text = SimpleNamespace(**fields)
    text.get_text_config = lambda: text
    return text


def test_positions() -> None:
    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert position_count(config()) is None
    assert position_count(config(max_position_embeddings=None)) is None
    assert position_count(config(max_position_embeddings=512, rope_parameters=None)) == 512
    assert position_count(config(max_position_embeddings=32768, rope_parameters=stretched)) == 131072
    assert position_count(config(max_position_embeddings=131072, rope_parameters={"factor": 8.0})) == 131072


def test_room_for_new_tokens() -> None:
    small = config(max_position_embeddings=16)
    assert [new_tokens(small, 10, wanted) for wanted in (1, 6, 7)] == [1, 6, 6]
    assert new_tokens(config(), 10, 99) == 99
    with pytest.raises(ConfigError, match="16 tokens, and the model 16 positions"):
        new_tokens(small, 16, 1)
