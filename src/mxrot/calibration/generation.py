"""Calibration windows that the original model writes itself (LLM-QAT, arXiv 2305.17888, section 2.1).

A text of one kind calibrates for that kind. What the model writes has the spread of what it was trained on, needs no
data, and is never the text that is measured on. Each sequence starts with a random token, or with a piece of a given
text, and goes on by sampling from the whole distribution; a window is several sequences, because many short ones take
less time than few long ones.

On a GPU one token of all sequences is a CUDA graph; transformers' own generation launches every operation of every
layer anew and takes ten times as long for a small model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.cuda_graphs import Replays
from mxrot.layers import FixedCache, shared_heads, step_mask
from mxrot.models import Family, find_family, start_token, value_heads
from mxrot.progress import Progress, part_of, silent

SEQUENCE_TOKENS = 256
PROMPT_TOKENS = 64
"""Of a text that sequences go on from; half a sequence at most."""
FREE = -1
"""Where the model chooses the token."""
CACHE_BYTES = {"cpu": 5e8, "cuda": 1.6e10}
"""Bounds the keys and values of the sequences that are written together."""
LARGE_MODEL_BYTES, CACHE_BESIDE_IT = 4e9, 4e9
"""A model of so many bytes leaves less room for them, and takes longer for a token whatever there are."""
SEQUENCES_AT_ONCE = 4096
STRIDE = 64
"""Attention looks at so many positions more whenever those it looked at are full."""
TELL_TOKENS = 16
"""Of each sequence, between two words on how far the writing is."""


@torch.no_grad()
def generated_windows(
    model: PreTrainedModel,
    count: int,
    length: int,
    generator: torch.Generator,
    text: Tensor | None = None,
    prompted: float = 0.0,
    progress: Progress = silent,
) -> Tensor:
    """`count` windows of `length` tokens, int64 [count, length] on the CPU.

    A share `prompted` of the sequences goes on from PROMPT_TOKENS tokens at a random place of `text`, int64 [W, T]; the
    others from one random token. Those and the seed of the sampling come from `generator`; other random states are
    left as they are. No sequence ends early: the end-of-text token is not sampled. Where texts for this model must
    start with one token, all sequences do. `progress` is told tokens.
    """
    config = model.config.get_text_config()
    tokens = min(SEQUENCE_TOKENS, length)
    sequences = -(-count * length // tokens)
    first = torch.randint(0, config.vocab_size, (sequences,), generator=generator)
    seed = int(torch.randint(0, 2**31, (1,), generator=generator))
    draws = torch.Generator(model.device).manual_seed(seed)
    starts = first[:, None]
    begin = start_token(model.config)
    if text is not None and prompted:
        text = text if begin is None else text[:, 1:]  # pieces of it, which do not begin again
        starts = _with_prompts(first, text, round(prompted * sequences), tokens // 2, generator)
    if begin is not None:
        starts = F.pad(starts, (1, 0), value=begin)
    with shared_heads(model):
        parts: list[Tensor] = []
        begun = 0
        for part in starts.split(sequences_at_once(model, tokens)):
            told = part_of(progress, begun, len(part) * tokens, sequences * tokens)
            columns = _counted(_sequences(model, part.to(model.device), tokens, draws), tokens, told)
            parts.append(torch.stack(list(columns), dim=1).cpu())
            begun += len(part) * tokens
    return torch.cat(parts).flatten()[: count * length].view(count, length)


def _counted(columns: Iterator[Tensor], tokens: int, progress: Progress) -> Iterator[Tensor]:
    """The same, and every TELL_TOKENS tokens a word on how many there are."""
    for position, column in enumerate(columns):
        if position % TELL_TOKENS == 0:
            column[:1].tolist()  # waits for a GPU, which would be told far too much about otherwise
            progress(position, tokens, "tokens that the model writes")
        yield column
    progress(tokens, tokens, "tokens that the model writes")


def _with_prompts(first: Tensor, text: Tensor, count: int, longest: int, generator: torch.Generator) -> Tensor:
    """Starts [S, tokens] of which `count`, evenly spread, are pieces of `text`; the others are `first` [S] and FREE."""
    length = min(PROMPT_TOKENS, longest, text.shape[1])
    starts = torch.full((len(first), length), FREE)
    starts[:, 0] = first
    window = torch.randint(0, len(text), (count, 1), generator=generator)
    place = torch.randint(0, text.shape[1] - length + 1, (count, 1), generator=generator)
    starts[torch.arange(count) * len(first) // max(1, count)] = text[window, place + torch.arange(length)]
    return starts


def _sequences(model: PreTrainedModel, starts: Tensor, tokens: int, draws: torch.Generator) -> Iterator[Tensor]:
    """The first tokens [S], then the second ones, up to `tokens`: those of `starts` [S, n] where they are not FREE."""
    first = starts[:, 0]
    family = find_family(model.config, "the model that writes")
    cache = FixedCache(tokens)
    places = torch.arange(tokens, device=model.device)
    current = first
    yield current
    for position in range(tokens - 1):
        if position % STRIDE == 0:
            cache.visible = min(tokens, position + STRIDE)
            replay = Replays()  # with this, the memory of the recording before goes
            step = partial(_next_tokens, model, family, cache)
        place = places[position : position + 1]
        drawn = torch.rand(len(first), 1, generator=draws, device=model.device)
        current = replay("next", step, current, place, drawn)
        if position + 1 < starts.shape[1]:
            given = starts[:, position + 1]
            current = torch.where(given == FREE, current, given)
        yield current


def _next_tokens(
    model: PreTrainedModel, family: Family, cache: FixedCache, current: Tensor, position: Tensor, drawn: Tensor
) -> Tensor:
    """A sample of the token after `current` [S] at `position` [1], int64 [S]; `drawn` [S, 1] from [0, 1) decides."""
    cache.position = position
    output = model(
        input_ids=current[:, None],
        position_ids=position[None],
        attention_mask=step_mask(model, family, position, cache.visible, len(current)),
        past_key_values=cache,
        use_cache=True,
    )
    probabilities = output.logits[:, -1].float().softmax(dim=-1)
    ends = model.config.get_text_config().eos_token_id
    for end in [] if ends is None else ends if isinstance(ends, (list, tuple)) else [ends]:
        probabilities[:, end] = 0.0
    reached = probabilities.cumsum(dim=-1)
    # The first token whose sum lies beyond the drawn share: never one without a chance.
    found = torch.searchsorted(reached, drawn * reached[:, -1:], right=True)[:, 0]
    return found.clamp(max=probabilities.shape[-1] - 1)


def sequences_at_once(model: PreTrainedModel, tokens: int) -> int:
    """How many sequences of so many tokens are written together."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return sequences_within(model.device.type, cache_bytes(model.config, tokens, model.dtype.itemsize), weights)


def sequences_within(device_type: str, sequence_bytes: int, model_bytes: float) -> int:
    """The same, for a kind of device and the bytes of keys and values that a sequence takes, and those of the model."""
    bound = CACHE_BYTES.get(device_type, CACHE_BYTES["cpu"])
    if model_bytes >= LARGE_MODEL_BYTES:
        bound = min(bound, CACHE_BESIDE_IT)
    return max(1, min(SEQUENCES_AT_ONCE, int(bound // sequence_bytes)))


def cache_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of keys and values of one sequence of so many tokens."""
    text = config.get_text_config()
    heads, width = value_heads(text)
    return int(2 * text.num_hidden_layers * heads * width * tokens * itemsize)
