"""Calibration windows that the original model writes itself (LLM-QAT, arXiv 2305.17888, section 2.1).

A text of one kind calibrates for that kind. What the model writes has the spread of what it was trained on, needs no
data, and is never the text that is measured on. Each sequence starts with a random token, one that the model draws, a
piece of a given text, or what the chat template puts before a user's turn, and goes on by sampling from the whole
distribution; a window is several sequences, because many short ones take less time than few long ones.

On a GPU one token of all sequences is a CUDA graph; transformers' own generation launches every operation of every
layer anew and takes ten times as long for a small model. A model that is spread over devices does so, too: what it
waits for is its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.calibration.manner import Kinds, Manner
from mxrot.calibration.speaking import Speakers
from mxrot.cuda_graphs import Replays
from mxrot.layers import FixedCache, SpreadCache, shared_heads, step_mask
from mxrot.layers.cache_size import CacheSize
from mxrot.models import Family, find_family, start_token, token_id
from mxrot.progress import Progress, part_of, silent

SEQUENCE_TOKENS = 256
PROMPT_TOKENS = 64
"""Of a text that sequences go on from; half a sequence at most."""
BURN_IN, BURN_INS = 16, 2
"""Tokens that the model goes on from one by, to draw a first token; and how often it starts anew with what it drew."""
FREE = -1
"""Where the model chooses the token."""
CACHE_BYTES = {"cpu": 5e8, "cuda": 1.6e10}
"""Bounds the keys and values of the sequences that are written together."""
LARGE_MODEL_BYTES, CACHE_BESIDE_IT = 4e9, 4e9
"""A model of so many bytes leaves less room for them, and takes longer for a token whatever there are."""
SEQUENCES_AT_ONCE = 4096
STRIDE = 64
"""Attention looks at so many positions more whenever those it looked at are full."""
SPREAD_AT_ONCE = "spread_sequences_at_once"
"""An attribute of a model whose blocks are on several devices: the number of sequences that it writes together."""
TELL_TOKENS = 16
"""Of each sequence, between two words on how far the writing is."""
PLAIN = Manner()


@torch.no_grad()
def generated_windows(
    model: PreTrainedModel,
    count: int,
    length: int,
    generator: torch.Generator,
    text: Tensor | None = None,
    manner: Manner = PLAIN,
    progress: Progress = silent,
) -> Tensor:
    """`count` windows of `length` tokens, int64 [count, length] on the CPU.

    Of the sequences a share `manner.prompted` goes on from PROMPT_TOKENS tokens at a random place of `text`, int64
    [W, T], a share `manner.chats` are conversations, where the model has a template for them, and the others start with
    one token as `manner.first` says. Those and the seed of the sampling come from `generator`; other random states are
    left as they are. No sequence ends early: the end-of-text token is sampled only where it ends a turn of a
    conversation. Where texts for this model must start with one token, all sequences do. `progress` is told tokens.
    """
    config = model.config.get_text_config()
    tokens = min(SEQUENCE_TOKENS, length)
    sequences = -(-count * length // tokens)
    first = torch.randint(0, config.vocab_size, (sequences,), generator=generator)
    seed = int(torch.randint(0, 2**31, (1,), generator=generator))
    draws = torch.Generator(model.device).manual_seed(seed)
    text = text if text is not None and len(text) else None
    kinds = Kinds.of(manner, sequences, text is not None)
    begin = start_token(model.config)
    with shared_heads(model):
        drawn = {"uniform": kinds.free[:0], "model": kinds.free, "both": kinds.free[1::2]}[manner.first]
        if len(drawn):
            first[drawn] = _drawn_first(model, first[drawn], begin, draws)
        starts = first[:, None]
        if text is not None and len(kinds.prompted):
            text = text if begin is None else text[:, 1:]  # pieces of it, which do not begin again
            starts = _with(starts, kinds.prompted, _pieces(text, len(kinds.prompted), tokens // 2, generator))
        if manner.turns is not None and len(kinds.chats):
            opening = torch.tensor(manner.turns.opening)
            opening = opening[1:] if begin is not None and opening[0] == begin else opening
            starts = _with(starts, kinds.chats, opening.expand(len(kinds.chats), -1))
        if begin is not None:
            starts = F.pad(starts, (1, 0), value=begin)
        is_chat = torch.isin(torch.arange(sequences), kinds.chats)
        temperatures = kinds.temperatures(manner.temperatures)
        parts: list[Tensor] = []
        begun = 0
        at_once = sequences_at_once(model, tokens)
        for rows in torch.arange(sequences).split(at_once):
            told = part_of(progress, begun, len(rows) * tokens, sequences * tokens)
            speakers = _speakers(model, manner, is_chat[rows])
            heat = None if temperatures is None else temperatures[rows].to(model.device)
            written = _sequences(model, starts[rows].to(model.device), tokens, draws, heat, speakers)
            parts.append(torch.stack(list(_counted(written, tokens, told)), dim=1).cpu())
            begun += len(rows) * tokens
    return torch.cat(parts).flatten()[: count * length].view(count, length)


def _drawn_first(model: PreTrainedModel, first: Tensor, begin: int | None, draws: torch.Generator) -> Tensor:
    """First tokens [S] as the model draws them.

    Where texts start with one token it is what follows that. Else windows of text begin anywhere: each sequence goes on
    from a random token for a while, starts anew with the last token it drew alone, and so on. What comes out is spread
    as tokens are in what the model writes, not as they are in its vocabulary.
    """
    tokens, rounds = (2, 1) if begin is not None else (BURN_IN, BURN_INS)
    for _ in range(rounds):
        found: list[Tensor] = []
        for part in first.split(sequences_at_once(model, tokens)):
            start = part if begin is None else torch.full_like(part, begin)
            *_, last = _sequences(model, start[:, None].to(model.device), tokens, draws)
            found.append(last.cpu())
        first = torch.cat(found)
    return first


def _speakers(model: PreTrainedModel, manner: Manner, is_chat: Tensor) -> Speakers | None:
    """The speakers of those of the sequences that are conversations; None if none is."""
    if manner.turns is None or not bool(is_chat.any()):
        return None
    return Speakers(manner.turns, _end_tokens(model), is_chat.to(model.device))


def _counted(columns: Iterator[Tensor], tokens: int, progress: Progress) -> Iterator[Tensor]:
    """The same, and every TELL_TOKENS tokens a word on how many there are."""
    for position, column in enumerate(columns):
        if position % TELL_TOKENS == 0:
            column[:1].tolist()  # waits for a GPU, which would be told far too much about otherwise
            progress(position, tokens, "tokens that the model writes")
        yield column
    progress(tokens, tokens, "tokens that the model writes")


def _with(starts: Tensor, rows: Tensor, pieces: Tensor) -> Tensor:
    """`starts` [S, n] with `pieces` in `rows`; the shorter ones are filled up with FREE."""
    missing = pieces.shape[1] - starts.shape[1]
    starts = F.pad(starts, (0, max(0, missing)), value=FREE)
    starts[rows] = F.pad(pieces, (0, max(0, -missing)), value=FREE)
    return starts


def _pieces(text: Tensor, count: int, longest: int, generator: torch.Generator) -> Tensor:
    """Pieces of `text`, PROMPT_TOKENS long and `longest` at most, int64 [count, tokens]."""
    length = min(PROMPT_TOKENS, longest, text.shape[1])
    window = torch.randint(0, len(text), (count, 1), generator=generator)
    place = torch.randint(0, text.shape[1] - length + 1, (count, 1), generator=generator)
    return text[window, place + torch.arange(length)]


def _sequences(
    model: PreTrainedModel,
    starts: Tensor,
    tokens: int,
    draws: torch.Generator,
    temperatures: Tensor | None = None,
    speakers: Speakers | None = None,
) -> Iterator[Tensor]:
    """The first tokens [S], then the second ones, up to `tokens`: those of `starts` [S, n] where they are not FREE."""
    first = starts[:, 0]
    family = find_family(model.config, "the model that writes")
    is_spread = hasattr(model, SPREAD_AT_ONCE)
    cache = SpreadCache(tokens, model.config) if is_spread else FixedCache(tokens, model.config)
    places = torch.arange(tokens, device=model.device)
    heat = () if temperatures is None else (temperatures,)
    may_end = () if speakers is None else (speakers.is_chat[:, None],)
    sampler = partial(_next_tokens, has_heat=bool(heat))
    current = first
    yield current
    for position in range(tokens - 1):
        if position % STRIDE == 0:
            cache.visible = min(tokens, position + STRIDE)
            # With this, the memory of the recording before goes.
            replay: Callable[..., Tensor] = _unrecorded if is_spread else Replays()
            step = partial(sampler, model, family, cache)
        place = places[position : position + 1]
        drawn = torch.rand(len(first), 1, generator=draws, device=model.device)
        current = replay("next", step, current, place, drawn, *heat, *may_end)
        given = starts[:, position + 1] if position + 1 < starts.shape[1] else None
        if speakers is not None:
            current = speakers.next(current, None if given is None else given != FREE)
        if given is not None:
            current = torch.where(given == FREE, current, given)
        yield current


def _unrecorded(_: Hashable, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """As `Replays` for what cannot be recorded: a recording is of one device, and waits for nothing."""
    return function(*tensors)


def _next_tokens(
    model: PreTrainedModel,
    family: Family,
    cache: FixedCache,
    current: Tensor,
    position: Tensor,
    drawn: Tensor,
    *more: Tensor,
    has_heat: bool = False,
) -> Tensor:
    """A sample of the token after `current` [S] at `position` [1], int64 [S]; `drawn` [S, 1] from [0, 1) decides.

    `more` are, both [S, 1], temperatures, if `has_heat`, and which sequences may draw a token that ends a text, if any.
    """
    cache.position = position
    output = model(
        input_ids=current[:, None],
        position_ids=position[None],
        attention_mask=step_mask(model, family, position, cache.visible, len(current)),
        past_key_values=cache,
        use_cache=True,
    )
    logits = output.logits[:, -1].float()
    may_end = more[-1] if len(more) > has_heat else torch.zeros(1, 1, dtype=torch.bool, device=logits.device)
    if has_heat:
        logits = logits / more[0]
        for end in _end_tokens(model):  # before the softmax, which may leave nothing to the others
            logits[:, end : end + 1].masked_fill_(~may_end, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    for end in _end_tokens(model):
        probabilities[:, end : end + 1] *= may_end
    reached = probabilities.cumsum(dim=-1)
    # The first token whose sum lies beyond the drawn share: never one of probability 0.
    found = torch.searchsorted(reached, drawn * reached[:, -1:], right=True)[:, 0]
    return found.clamp(max=probabilities.shape[-1] - 1)


def _end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Those that end a text."""
    ends = token_id(model.config, "eos_token_id")
    return () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)


def sequences_at_once(model: PreTrainedModel, tokens: int) -> int:
    """How many sequences of so many tokens are written together."""
    if hasattr(model, SPREAD_AT_ONCE):
        return int(getattr(model, SPREAD_AT_ONCE))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return sequences_within(model.device.type, cache_bytes(model.config, tokens, model.dtype.itemsize), weights)


def sequences_within(device_type: str, sequence_bytes: int, model_bytes: float) -> int:
    """The same, for a kind of device and the bytes of keys and values that a sequence takes, and those of the model."""
    bound = CACHE_BYTES.get(device_type, CACHE_BYTES["cpu"])
    if model_bytes >= LARGE_MODEL_BYTES:
        bound = min(bound, CACHE_BESIDE_IT)
    return max(1, min(SEQUENCES_AT_ONCE, int(bound // sequence_bytes)))


def cache_bytes(config: Any, tokens: int, itemsize: int, family: Family | None = None) -> int:
    """The bytes of keys, values and states of one sequence; FamilyError if no family is given and none is known."""
    family = family or find_family(config, "the model that writes")
    return CacheSize.of(config, family, None).bytes_without_windows(tokens, itemsize)
