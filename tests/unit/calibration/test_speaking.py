"""Conversations of a model with itself, read back by hand."""

import copy

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mxrot.calibration import Manner, generated_windows, generation, speaking
from mxrot.text import Turns

LENGTH, LONGEST = 60, 5
ENDS = (7, *range(128, 256))
TURNS = Turns((1, 2, 3), (7, 4), (7, 5, 6), ENDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), eos_token_id=7)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def written(model: PreTrainedModel, manner: Manner, count: int = 30, text: Tensor | None = None) -> Tensor:
    return generated_windows(model, count, LENGTH, torch.Generator().manual_seed(0), text, manner)


def said(row: list[int]) -> list[list[int]]:
    """What the speakers say in turn; AssertionError if anything stands between them but what the template writes."""
    assert row[:3] == [1, 2, 3]
    rest, turns = row[3:], []
    while rest:
        between = ([7, 4], [7, 5, 6])[len(turns) % 2]
        length = next((index for index, token in enumerate(rest) if token in ENDS), len(rest))
        turns.append(rest[:length])
        assert rest[length : length + len(between)] == between[: len(rest) - length]
        rest = rest[length + len(between) :]
    return turns


def test_a_conversation_has_turns(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaking, "USER_TOKENS", LONGEST)
    found = [said(row) for row in written(model, Manner(chats=1.0, turns=TURNS)).tolist()]
    assert sum(len(turns) > 3 for turns in found) > 10
    users = [len(turn) for turns in found for turn in turns[::2]]
    answers = [len(turn) for turns in found for turn in turns[1::2]]
    assert max(users) == LONGEST < max(answers) and min(users) == 0


def test_a_user_who_never_ends(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is given after USER_TOKENS, and goes on to the end."""
    monkeypatch.setattr(speaking, "USER_TOKENS", LONGEST)
    monkeypatch.setattr(generation, "_end_tokens", lambda model: ())
    for row in written(model, Manner(chats=1.0, turns=Turns((1, 2, 3), (7, 4), (7, 5, 6)))).tolist():
        assert row[:3] == [1, 2, 3] and row[3 + LONGEST : 5 + LONGEST] == [7, 4]


def test_a_mixture(model: PreTrainedModel) -> None:
    """Prompted sequences start with pieces of the text, conversations as the template does; both stand evenly."""
    text = random_windows(2, 80)
    found = written(model, Manner("model", 1 / 3, 1 / 3, (0.7, 1.0), TURNS), text=text)
    pieces = {tuple(piece.tolist()) for window in text for piece in window.unfold(0, 30, 1)}
    prompted = [index for index, row in enumerate(found.tolist()) if tuple(row[:30]) in pieces]
    chats = [index for index, row in enumerate(found.tolist()) if row[:3] == [1, 2, 3]]
    assert prompted == list(range(0, 30, 3)) and len(chats) == 10 and not set(chats) & set(prompted)
    others = [row for index, row in enumerate(found) if index not in {*chats, *prompted}]
    assert len(others) == 10 and all((row != 7).all() for row in others)
    for index in chats:
        said(found[index].tolist())
    assert torch.equal(found, written(model, Manner("model", 1 / 3, 1 / 3, (0.7, 1.0), TURNS), text=text))


def test_conversations_leave_free_text_as_it_was(model: PreTrainedModel) -> None:
    """A row that is no conversation has the same first token, and draws the same numbers."""
    alone, mixed = written(model, Manner()), written(model, Manner(chats=0.5, turns=TURNS))
    free = [index for index, row in enumerate(mixed.tolist()) if row[:3] != [1, 2, 3]]
    assert len(free) == 15 and torch.equal(alone[free], mixed[free])


def test_a_low_temperature_is_greedy(model: PreTrainedModel) -> None:
    found = written(model, Manner(temperatures=(1e-6,)), count=6)
    with torch.no_grad():
        logits = model(found).logits[:, :-1]
    assert (logits.argmax(dim=-1) == 7).any()  # the end, which it may not draw
    logits[..., 7] = -torch.inf
    assert torch.equal(found[:, 1:], logits.argmax(dim=-1))


def test_temperatures_are_taken_in_turn(model: PreTrainedModel) -> None:
    """Every second sequence is greedy, the others are what they are at temperature 1."""
    found = written(model, Manner(temperatures=(1.0, 1e-6)), count=6)
    assert torch.equal(found[::2], written(model, Manner(), count=6)[::2])
    assert not torch.equal(found[1::2], written(model, Manner(), count=6)[1::2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_recording_writes_what_single_operations_write(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations, temperatures and burnt-in first tokens, all of them played back, and none."""
    here = copy.deepcopy(model).to("cuda")
    manner = Manner("model", chats=0.5, temperatures=(0.8, 1.1), turns=TURNS)
    played = written(here, manner)
    for index, row in enumerate(played.tolist()):
        if row[:3] == [1, 2, 3]:
            said(row)
        else:
            assert 7 not in row, index
    monkeypatch.setattr(generation, "Replays", lambda: lambda key, function, *tensors: function(*tensors))
    assert torch.equal(written(here, manner), played)


def test_first_tokens_are_those_that_the_model_draws(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that draws one of four tokens, whatever went before: so are all first tokens."""
    favoured = torch.tensor([11, 22, 33, 44])
    own = generation._next_tokens

    def next_tokens(*given: object, **options: object) -> Tensor:
        own(*given, **options)  # type: ignore[arg-type]
        drawn = given[5]
        assert isinstance(drawn, Tensor)
        return favoured[(drawn[:, 0] * 4).long()]

    monkeypatch.setattr(generation, "_next_tokens", next_tokens)
    found = written(model, Manner("model"), count=200)
    counts = torch.bincount(found[:, 0], minlength=256)[favoured]
    assert counts.sum() == 200 and counts.min() > 30
    plain = written(model, Manner(), count=200)[:, 0]
    assert len(plain.unique()) > 100
    both = written(model, Manner("both"), count=200)[:, 0]
    assert torch.equal(both[0::2], plain[0::2]) and torch.isin(both[1::2], favoured).all()
